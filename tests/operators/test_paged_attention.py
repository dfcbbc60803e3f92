"""Attention over a given cache, against float64 attention over what the cache holds; see hostile.py for both.

Its quantization error, which no kernel can avoid, is measured apart at the end.
"""

import dataclasses
import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from hostile import Batch, assert_attention_close, make_batch, same_bits

from vllm_int8kv.cache import key_transform, ops, quantizer, reference
from vllm_int8kv.cache.formats import FORMATS, K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
wide_and_narrow = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MIXED = ((1, 1328), (5, 18), (129, 463), (1, 1), (16, 16))

make_batch = lru_cache(maxsize=128)(make_batch)  # the kernels leave a batch as it is, so all of them can share it


def attend(batch: Batch, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.paged_attention(*batch.args, return_lse=True, **options, cache_format=batch.cache_format)


def check(batch: Batch, **options: Any) -> None:
    options.setdefault("softmax_scale", batch.query.shape[2] ** -0.5)
    assert_attention_close(attend(batch, **options), batch, **options)


# (num_heads, num_kv_heads, head_size, block_size)
SHAPES = [
    (4, 4, 64, 16),
    (9, 3, 64, 16),
    (8, 2, 64, 32),
    (8, 2, 128, 16),
    (8, 2, 128, 128),
    (14, 2, 64, 48),
    (8, 1, 96, 16),
    (12, 1, 80, 32),
    (2, 1, 256, 16),
    (2, 2, 192, 128),
    (40, 1, 48, 16),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"h{s[0]}-kv{s[1]}-d{s[2]}-b{s[3]}")
def test_mixed_batches(kernel, shape, dtype):
    names = ("num_heads", "num_kv_heads", "head_size", "block_size")
    check(make_batch(MIXED, **dict(zip(names, shape, strict=True)), dtype=dtype, device=kernel))


@wide_and_narrow
@pytest.mark.parametrize("head_size", [*range(32, 257, 16), 512])
def test_head_sizes(kernel, head_size, dtype):
    lens = ((1, 200), (7, 40))
    check(make_batch(lens, num_heads=3, num_kv_heads=1, head_size=head_size, dtype=dtype, device=kernel))


@each_dtype
@pytest.mark.parametrize("block_size", [16, 32, 48, 128, 272])
def test_around_a_block(kernel, block_size, dtype):
    seq_lens = (block_size - 1, block_size, block_size + 1, 2 * block_size + 1)
    lens = tuple((query_len, n) for n in seq_lens for query_len in (1, 2, n))
    check(make_batch(lens, block_size=block_size, dtype=dtype, device=kernel))


@each_dtype
def test_around_a_split(kernel, dtype):
    """Decode and verification next to every multiple of 128 that a kernel may choose as its split."""
    edges = [n + i for n in (128, 256, 384, 512, 768, 1024, 2048) for i in (-1, 0, 1)]
    lens = tuple((1 + n % 3, n) for n in edges)
    check(make_batch(lens, num_heads=2, num_kv_heads=1, dtype=dtype, device=kernel))


@wide_and_narrow
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "k8v8"])
def test_formats(kernel, name, dtype):
    """Fewer bits, with heads and blocks that fill lines of their planes and that do not."""
    for num_heads, num_kv_heads, head_size, block_size in ((6, 2, 64, 32), (5, 1, 80, 16), (4, 4, 128, 128)):
        sizes = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, head_size=head_size, block_size=block_size)
        check(
            make_batch(((1, 270), (5, 18), (40, 90)), **sizes, dtype=dtype, device=kernel, cache_format=FORMATS[name])
        )


@wide_and_narrow
@pytest.mark.parametrize("head_size", [*range(32, 257, 16), 512])
@pytest.mark.parametrize("name", ["k6v4", "k5v2"])
def test_head_sizes_of_formats(kernel, name, head_size, dtype):
    sizes = dict(num_heads=3, num_kv_heads=1, head_size=head_size, device=kernel)
    batch = make_batch(((1, 200), (7, 40)), **sizes, dtype=dtype, cache_format=FORMATS[name])
    if kernel == "cpu" or FORMATS[name].has_cuda_kernels(head_size):
        check(batch)
        return
    with pytest.raises(RuntimeError, match=f"'{name}' has CUDA kernels for head sizes up to 128, but query has head_"):
        attend(batch, softmax_scale=0.1)


SLOPES = torch.tensor([2.0**-i for i in range(1, 9)])
SINKS = torch.tensor([0.0, -3.0, 2.0, 9.0, -40.0, 0.5, 1.0, 4.0])
EQUALIZER = 0.25 + 3 * torch.rand(2, 64, generator=torch.Generator().manual_seed(5))
OPTIONS = {  # for 8 heads, 2 KV heads and head_size 64
    "window-1": {"sliding_window": 1},
    "window-7": {"sliding_window": 7},
    "window-128": {"sliding_window": 128},
    "window-1000": {"sliding_window": 1000},
    "window-huge": {"sliding_window": 2**31 - 1},
    "softcap": {"softcap": 3.0},
    "softcap-50": {"softcap": 50.0},
    "alibi": {"alibi_slopes": SLOPES},
    "sinks": {"sinks": SINKS},
    "non-causal": {"causal": False},
    "non-causal-window": {"causal": False, "sliding_window": 20},
    "non-causal-alibi": {"causal": False, "alibi_slopes": SLOPES},
    "unrotated": {"key_transform": KeyTransform(rotate=False)},
    "equalized": {"key_transform": KeyTransform(equalizer=EQUALIZER)},
    "equalized-unrotated": {"key_transform": KeyTransform(rotate=False, equalizer=EQUALIZER)},
    "sharp": {"softmax_scale": 4.0},
    "flat": {"softmax_scale": 0.0},
    "all": {
        "sliding_window": 100,
        "softcap": 5.0,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
        "key_transform": KeyTransform(equalizer=EQUALIZER),
        "softmax_scale": 0.3,
    },
}
each_option = pytest.mark.parametrize("option", OPTIONS)


def on(device: str, options: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor | KeyTransform) else x for name, x in options.items()}


def batch_for(option: str, lens: tuple[tuple[int, int], ...], **how: Any) -> Batch:
    """A batch whose cache was written as the option reads it."""
    written = {name: x for name, x in OPTIONS[option].items() if name == "key_transform"}
    return make_batch(lens, **how, **written)


@each_dtype
@each_option
def test_options(kernel, option, dtype):
    check(batch_for(option, MIXED, dtype=dtype, device=kernel), **on(kernel, OPTIONS[option]))


@wide_and_narrow
@each_option
def test_options_of_formats(kernel, option, dtype):
    batch = batch_for(option, MIXED, dtype=dtype, device=kernel, cache_format=FORMATS["k6v4"])
    check(batch, **on(kernel, OPTIONS[option]))


@wide_and_narrow
@pytest.mark.parametrize("name", ["k6v4", "k4v4"])
def test_outliers_of_formats(kernel, name, dtype):
    """Values whose steps and midpoints differ by many powers of ten, and scores below ten."""
    batch = make_batch(MIXED, outliers=True, dtype=dtype, device=kernel, cache_format=FORMATS[name])
    check(batch, softmax_scale=0.002)


def test_bits_of_a_format_do_not_depend_on_the_batch(kernel, set_num_threads):
    """Nor on the number of threads, nor on how a prompt was cut into chunks; on a GPU they do, as with 8 bits."""
    lens = ((1, 1328), (129, 700), (1, 40))
    batch = make_batch(lens, dtype=torch.bfloat16, device=kernel, cache_format=FORMATS["k6v4"])
    options = {"softmax_scale": 0.125}
    want = attend(batch, **options)[0]
    if kernel == "cuda":
        assert same_bits(attend(batch, **options)[0][: batch.num_tokens], want[: batch.num_tokens])
        return
    set_num_threads(2)
    assert same_bits(attend(batch, **options)[0][: batch.num_tokens], want[: batch.num_tokens])
    for seq in range(3):
        assert same_bits(attend(batch.alone(seq), **options)[0], want[batch.rows(seq)])
    rows = batch.rows(1)
    pieces = [attend(batch.piece(1, begin, end), **options)[0] for begin, end in ((0, 50), (50, 51), (51, 129))]
    assert same_bits(torch.cat(pieces), want[rows])


@wide_and_narrow
@pytest.mark.parametrize("window", [1, 20, 600, None])
def test_non_causal_with_more_queries_than_keys(kernel, window, dtype):
    lens = ((40, 7), (3, 0), (1, 0), (600, 530), (64, 1))
    check(make_batch(lens, dtype=dtype, device=kernel), causal=False, sliding_window=window)


@wide_and_narrow
@pytest.mark.parametrize("window", [1, 16, 100, 700])
def test_blocks_freed_before_the_window(kernel, window, dtype):
    batch = make_batch(((1, 1328), (40, 700), (1, 16), (1, 17), (3, 130)), dtype=dtype, device=kernel)
    options = {"sliding_window": window, "softmax_scale": 0.125}
    assert_attention_close(attend(batch.freed_before_window(window), **options), batch, **options)


@each_dtype
@pytest.mark.parametrize("rotate_keys", [False, True])
def test_outliers(kernel, rotate_keys, dtype):
    """Loud channels and tokens, and values whose scales differ by many powers of ten.

    With scores in the hundreds the rounding of a score would decide, so they are scaled down to below ten.
    """
    batch = make_batch(MIXED, outliers=True, key_transform=KeyTransform(rotate=rotate_keys), dtype=dtype, device=kernel)
    check(batch, key_transform=KeyTransform(rotate=rotate_keys), softmax_scale=0.004)


@each_dtype
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums(kernel, sign, dtype):
    """Every code +-127 and every query element equal: the largest sums that integers must hold."""
    batch = make_batch(((4, 600),), num_heads=2, num_kv_heads=1, head_size=512, dtype=dtype, device=kernel)
    planes = K8V8.unpack(batch.kv_cache)
    planes.k_codes.fill_(127 * sign)
    planes.v_codes.fill_(127)
    batch = dataclasses.replace(batch, kv_cache=K8V8.pack(planes), query=torch.ones_like(batch.query))
    check(batch, key_transform=KeyTransform(rotate=False), softmax_scale=1e-3)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_a_row_that_sees_no_key(kernel, sinks):
    batch = make_batch(((2, 0), (20, 2)), device=kernel)
    sinks = None if sinks is None else sinks.to(kernel)
    out, lse = attend(batch, softmax_scale=1.0, causal=False, sliding_window=3, sinks=sinks)
    blind = slice(0, 18)  # both rows of the first; positions -18 to -3 of the second, which see up to -1
    assert not out[blind].any() and out[18:22].abs().amax((1, 2)).all()
    want = torch.full((8, 1), -math.inf) if sinks is None else sinks.cpu()[:, None]
    assert torch.equal(lse[:, blind].cpu(), want.expand(8, 18))


@wide_and_narrow
@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
def test_a_query_that_is_not_finite_spoils_no_other(kernel, sinks, dtype):
    batch = make_batch(MIXED, dtype=dtype, device=kernel)
    options = {"softmax_scale": 0.125, "sinks": None if sinks is None else sinks.to(kernel)}
    out, lse = attend(batch, **options)
    query = batch.query.clone()
    query[0, 3, 5], query[8, 0, 0] = torch.nan, torch.inf
    spoiled_out, spoiled_lse = attend(dataclasses.replace(batch, query=query), **options)
    for token, head in ((0, 3), (8, 0)):
        assert spoiled_out[token, head].isnan().all() and spoiled_lse[head, token].isnan()
        spoiled_out[token, head], spoiled_lse[head, token] = out[token, head], lse[head, token]
    rows = slice(0, batch.num_tokens)
    assert same_bits(spoiled_out[rows], out[rows]) and same_bits(spoiled_lse, lse)


@each_dtype
def test_out_is_written_where_it_is_and_nowhere_else(kernel, dtype):
    batch = make_batch(MIXED, dtype=dtype, device=kernel)
    num_padded, num_heads, head_size = batch.query.shape
    storage = torch.full((num_padded, num_heads + 1, head_size + 24), 7.0, dtype=dtype, device=kernel)
    out = storage[:, 1:, 8 : 8 + head_size]
    got = ops.paged_attention(*batch.args, softmax_scale=0.125, out=out, cache_format=K8V8)
    assert got is out
    want = ops.paged_attention(*batch.args, softmax_scale=0.125, cache_format=K8V8)
    assert same_bits(out[: batch.num_tokens], want[: batch.num_tokens])
    out[: batch.num_tokens] = 7.0
    assert (storage == 7.0).all(), "a padding row or a gap was written"


# On CPU the bits of a row depend on nothing but the row and the keys it sees. On a GPU they depend on the lengths of
# all sequences too, by which the thread blocks share the work.
@wide_and_narrow
@pytest.mark.parametrize("option", ["sinks", "all", "non-causal"])
def test_placement_of_blocks_changes_no_bit(kernel, option, dtype):
    first, second = (batch_for(option, MIXED, dtype=dtype, device=kernel, placement=seed) for seed in (1, 2))
    assert not torch.equal(first.block_table, second.block_table)
    options = {"softmax_scale": 0.125, **on(kernel, OPTIONS[option])}
    (out, lse), (other_out, other_lse) = attend(first, **options), attend(second, **options)
    assert same_bits(out[: first.num_tokens], other_out[: first.num_tokens]) and same_bits(lse, other_lse)


@wide_and_narrow
@pytest.mark.parametrize("option", ["window-128", "all", "non-causal"])
def test_company_in_the_batch(kernel, option, dtype):
    batch = batch_for(option, (*MIXED, (3, 513), (1, 2100)), dtype=dtype, device=kernel)
    options = on(kernel, {"softmax_scale": 0.125, **OPTIONS[option]})
    out, lse = attend(batch, **options)
    if kernel == "cuda":
        assert_attention_close((out, lse), batch, **options)
        return
    for seq in range(len(batch.seq_lens)):
        alone, alone_lse = attend(batch.alone(seq), **options)
        assert same_bits(alone, out[batch.rows(seq)]) and same_bits(alone_lse, lse[:, batch.rows(seq)])


@wide_and_narrow
@pytest.mark.parametrize("option", ["window-128", "all", "sinks"])
def test_chunks_of_a_prefill(kernel, option, dtype):
    batch = batch_for(option, ((700, 1100),), dtype=dtype, device=kernel)
    options = {"softmax_scale": 0.125, **on(kernel, OPTIONS[option])}
    out, lse = attend(batch, **options)
    for begin, end in ((0, 1), (1, 300), (300, 365), (365, 699), (699, 700)):
        piece = batch.piece(0, begin, end)
        part, part_lse = attend(piece, **options)
        if kernel == "cuda":
            assert_attention_close((part, part_lse), piece, **options)
            continue
        assert same_bits(part, out[begin:end]) and same_bits(part_lse, lse[:, begin:end])


@each_dtype
@pytest.mark.parametrize("lens", [((1, 5000),), MIXED, ((700, 1100),)], ids=["decode", "mixed", "prefill"])
def test_threads_and_repetition_change_no_bit(kernel, set_num_threads, lens, dtype):
    batch = make_batch(lens, dtype=dtype, device=kernel)
    results = []
    for num_threads in (1, 2, 2, 5):
        set_num_threads(num_threads)
        results.append(attend(batch, softmax_scale=0.125, sinks=SINKS.to(kernel)))
    for out, lse in results[1:]:
        assert same_bits(out[: batch.num_tokens], results[0][0][: batch.num_tokens])
        assert same_bits(lse, results[0][1])


def test_offsets_beyond_32_bits(kernel):
    batch = make_batch(((1, 40), (3, 20)), device=kernel)
    num_blocks, *rest = batch.kv_cache.shape
    far = 2**32 // batch.kv_cache[0].numel() + 1
    kv_cache = torch.empty(far + num_blocks, *rest, dtype=torch.int8, device=kernel)  # touched at its end only
    kv_cache[far:] = batch.kv_cache
    block_table = torch.where(batch.block_table < num_blocks, batch.block_table + far, batch.block_table)
    moved = dataclasses.replace(batch, kv_cache=kv_cache, block_table=block_table.to(torch.int32))
    out, lse = attend(batch, softmax_scale=0.125)
    moved_out, moved_lse = attend(moved, softmax_scale=0.125)
    rows = slice(0, batch.num_tokens)
    assert same_bits(moved_out[rows], out[rows]) and same_bits(moved_lse, lse)


def quantization_error(batch: Batch, softmax_scale: float, **options: Any) -> torch.Tensor:
    """[query_len, num_heads, head_size] of a batch of one sequence: INT8 against its unquantized K and V."""
    rows, seq_len = batch.num_tokens, int(batch.seq_lens[0])
    out = (
        ops.paged_attention(*batch.args, softmax_scale=softmax_scale, **options, cache_format=K8V8)[:rows]
        .double()
        .cpu()
    )
    mask = reference.visible_keys(torch.arange(seq_len - rows, seq_len), seq_len, causal=True, sliding_window=None)
    unquantized = (batch.query[:rows].cpu().double(), batch.keys[0].double(), batch.values[0].double())
    return (out - reference.attention(*unquantized, mask, softmax_scale=softmax_scale)[0]).abs()


@pytest.mark.parametrize("rotate_keys", [False, True], ids=["plain", "rotated"])
@pytest.mark.parametrize("outliers", [False, True], ids=["random", "outliers"])
def test_quantization_error(kernel, outliers, rotate_keys, record_property):
    """INT8 against attention on the unquantized K and V: every code is off by at most half a step.

    With a score off by at most delta, a probability is off by a factor of at most exp(2 * delta).
    """
    softmax_scale = 0.004 if outliers else 0.125
    batch = make_batch(((64, 300),), outliers=outliers, key_transform=KeyTransform(rotate=rotate_keys), device=kernel)
    error = quantization_error(batch, softmax_scale, key_transform=KeyTransform(rotate=rotate_keys))
    query, key, value = batch.query[:64].cpu(), batch.keys[0], batch.values[0]
    turn = key_transform.hadamard_rotate if rotate_keys else torch.clone
    k_step = quantizer.quantize(turn(key)).scales.double().amax()
    v_step = quantizer.quantize(value).scales.double().amax()
    delta = softmax_scale * turn(query).abs().sum(-1).double() * k_step / 2
    assert (error.amax(-1) <= torch.expm1(2 * delta) * value.abs().max() + v_step / 2).all()
    record_property("max_error", float(error.max()))
    record_property("rms_error", float(error.square().mean().sqrt()))


def test_rotation_reduces_the_error_of_outliers(device):
    errors = {}
    for rotate_keys in (False, True):
        batch = make_batch(((64, 300),), outliers=True, key_transform=KeyTransform(rotate=rotate_keys), device=device)
        errors[rotate_keys] = (
            quantization_error(batch, 0.02, key_transform=KeyTransform(rotate=rotate_keys)).square().mean().sqrt()
        )
    assert errors[True] < 0.8 * errors[False]

"""The CUDA kernels of the cache formats below 8 bits, on the host as in `test_cuda_emulation.py`.

Cache write and gather run for every format; they choose it at run time. Attention is compiled once per format, so here
for those of `emulated_cuda.FORMATS`, which have every number of bits of K and of V; `--all-formats` takes the others
too, in two minutes.
"""

import ctypes
from dataclasses import replace

import emulated_cuda
import hostile
import pytest
import torch
from emulated_cuda import BLOCKS, MODES, OPTIONS, check

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.formats import FORMATS, CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

LOW_BITS = [name for name in FORMATS if name != "k8v8"]
HEAD_SIZES = [80, 128, 64, 32, 112]
"""With padding (80 of two bits, 32 and 112 of one) and without; every format takes one, neighbours another."""
each_format = pytest.mark.parametrize(
    "name, head_size", [(name, HEAD_SIZES[i % len(HEAD_SIZES)]) for i, name in enumerate(LOW_BITS)]
)
# A full group off the token grid, a group cut short by padding, single tokens, a group across -1.
SLOT_MAPPING = [*range(39, 50), -1, 5, *range(64, 80), 80, 82, *range(16, 26), -1, 26, *range(27, 32)]


def write(kernels: ctypes.CDLL, mode: tuple[int, int], kv_cache: torch.Tensor, *args, **options) -> torch.Tensor:
    """The cache after a write by the emulated kernel."""
    written = kv_cache.clone(memory_format=torch.preserve_format)
    kernels.set_mode(*mode, BLOCKS[0])
    emulated_cuda.reshape_and_cache(kernels, *args[:2], written, args[2], **options)
    return written


@each_format
def test_cache_write_is_bit_equal(kernels, name, head_size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][LOW_BITS.index(name) % 3]
    slot_mapping = torch.tensor(SLOT_MAPPING)
    qkv = torch.randn(len(slot_mapping), 3, 2, head_size).to(dtype)
    qkv[3, 1, 0, 5], qkv[4, 2, 1] = torch.nan, 0.0
    qkv[6, 1:, 1, 2:4], qkv[7, 1:, 0] = torch.inf, 1.5
    qkv[8, 1:] *= 1e-30
    key, value = qkv[:, 1], qkv[:, 2]
    equalizer = torch.rand(2, head_size) + 0.5
    for mode, key_transform in zip(MODES, (KeyTransform(rotate=False), KeyTransform(equalizer=equalizer)), strict=True):
        options = {"cache_format": FORMATS[name], "key_transform": key_transform}
        before = hostile.garbage_cache(2, 2, 48, head_size, cache_format=FORMATS[name])
        got = write(kernels, mode, before, key, value, slot_mapping, **options)
        by_reference, by_cpu = before.clone(), before.clone()
        reference.reshape_and_cache(key, value, by_reference, slot_mapping, **options)
        ops.reshape_and_cache(key, value, by_cpu, slot_mapping, **options)
        assert hostile.same_bits(got, by_reference)
        assert hostile.same_bits(got, by_cpu)


@each_format
def test_gather_is_bit_equal(kernels, name, head_size):
    dtype = [torch.float32, torch.float16, torch.bfloat16][LOW_BITS.index(name) % 3]
    sizes = {"num_kv_heads": 2, "head_size": head_size, "block_size": 48}
    batch = hostile.make_batch([(1, 70), (1, 5), (1, 50)], num_heads=2, **sizes, cache_format=FORMATS[name])
    # From the middle of a block across its end, nothing, and everything.
    place = batch.block_table, *(torch.tensor(x, dtype=torch.int32) for x in ([0, 30, 30, 80], [39, 2, 0]))
    equalizer = torch.rand(2, head_size) + 0.5
    for mode, key_transform in zip(MODES, (KeyTransform(rotate=False), KeyTransform(equalizer=equalizer)), strict=True):
        options = {"cache_format": FORMATS[name], "key_transform": key_transform}
        kernels.set_mode(*mode, BLOCKS[0])
        got = torch.full((90, 2, head_size), -7.0, dtype=dtype), torch.full((90, 2, head_size + 1), -7.0, dtype=dtype)
        want = tuple(x.clone() for x in got)
        emulated_cuda.gather_cache(kernels, got[0], got[1][..., 1:], batch.kv_cache, *place, **options)
        reference.gather_cache(want[0], want[1][..., 1:], batch.kv_cache, *place, **options)
        for x, y in zip(got, want, strict=True):
            assert hostile.same_bits(x, y)


def test_a_constant_vector_comes_back(kernels):
    """Its scale is 0, and its midpoint says all."""
    key = torch.tensor([0.5, -3.0, 0.0])[:, None, None].expand(3, 1, 64).contiguous()
    options = {"cache_format": FORMATS["k2v2"], "key_transform": KeyTransform(rotate=False)}
    cache = hostile.garbage_cache(2, 1, 16, 64, cache_format=FORMATS["k2v2"])
    written = write(kernels, MODES[0], cache, key, key, torch.tensor([3, 16, 31]), **options)
    back = torch.zeros(2, 1, 64), torch.zeros(2, 1, 64)
    table, ints = torch.tensor([[1]], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for row, slot in enumerate((0, 15)):
        starts = torch.tensor([slot], dtype=torch.int32)
        emulated_cuda.gather_cache(kernels, *(x[row : row + 1] for x in back), written, table, ints, starts, **options)
    assert torch.equal(back[0], key[1:]) and torch.allclose(back[1], key[1:], atol=1e-6)


SHAPES = {
    "fp32-d80": (torch.float32, 80, 7, 1, 16, [(1, 65), (5, 18), (2, 90)]),
    "bf16-d64-decode": (torch.bfloat16, 64, 8, 2, 16, [(1, 1), (1, 300), (1, 65)]),
    "fp16-d128-decode": (torch.float16, 128, 4, 1, 32, [(1, 1), (1, 300), (1, 65)]),
    "bf16-d80-decode": (torch.bfloat16, 80, 3, 1, 48, [(1, 130), (1, 5)]),
    "fp16-d64-mixed": (torch.float16, 64, 7, 1, 16, [(1, 65), (5, 18), (3, 90)]),
    "bf16-d128-mixed": (torch.bfloat16, 128, 4, 2, 32, [(1, 65), (5, 18), (9, 190)]),
}
"""Each of the five kernels that a format has, with and without padding."""
ALL_SHAPES = ("k6v4", "k2v2")
"""Formats that take every shape; the others take two each, in turn."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is not test_mixed_batches:
        return
    cases = []
    for i, name in enumerate(name for name in emulated_cuda.formats_of(metafunc.config) if name != "k8v8"):
        shapes = list(SHAPES)
        cases += [(name, shape) for shape in (shapes if name in ALL_SHAPES else [shapes[i % 3], shapes[3 + i % 3]])]
    metafunc.parametrize("name, shape", cases)


def test_mixed_batches(kernels, name, shape):
    dtype, head_size, num_heads, num_kv_heads, block_size, lens = SHAPES[shape]
    batch = hostile.make_batch(
        lens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        outliers=head_size == 128,
        cache_format=FORMATS[name],
    )
    check(kernels, batch, softmax_scale=0.004 if head_size == 128 else head_size**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(kernels, name, dtype):
    options = {"softmax_scale": 0.125} | OPTIONS[name]
    batch = hostile.make_batch(
        [(1, 200), (4, 130), (20, 70)],
        num_heads=6,
        dtype=dtype,
        key_transform=options.get("key_transform", KeyTransform()),
        cache_format=FORMATS["k6v4"],
    )
    check(kernels, batch, **options)


@pytest.mark.parametrize("name", ["k6v4", "k2v2"])
def test_v_scales_and_midpoints_of_every_magnitude(kernels, name):
    cache_format = FORMATS[name]
    batch = hostile.make_batch([(1, 200)], dtype=torch.float16, cache_format=cache_format)
    values = batch.values[0]
    values.mul_(10.0 ** torch.linspace(-6, 3, 200)[:, None, None])
    values[50:60] = values[50:60, :, :1]  # constant
    slots = (batch.block_table[0, :13].long()[:, None] * 16 + torch.arange(16)).flatten()[:200]
    reference.reshape_and_cache(batch.keys[0], values, batch.kv_cache, slots, cache_format=cache_format)
    check(kernels, batch, softmax_scale=0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_query_that_is_not_finite_spoils_no_other(kernels, dtype):
    batch = hostile.make_batch([(1, 200), (3, 130)], num_heads=6, dtype=dtype, cache_format=FORMATS["k6v4"])
    kernels.set_mode(*MODES[0], BLOCKS[2])
    options = {"softmax_scale": 0.125, "cache_format": FORMATS["k6v4"]}
    out, lse = emulated_cuda.paged_attention(kernels, batch, **options)
    query = batch.query.clone()
    query[0, 2, 5], query[2, 0, 0] = torch.nan, torch.inf
    spoiled_out, spoiled_lse = emulated_cuda.paged_attention(kernels, replace(batch, query=query), **options)
    for token, head in ((0, 2), (2, 0)):
        assert spoiled_out[token, head].isnan().all() and spoiled_lse[head, token].isnan()
        spoiled_out[token, head], spoiled_lse[head, token] = out[token, head], lse[head, token]
    rows = slice(0, batch.num_tokens)
    assert hostile.same_bits(spoiled_out[rows], out[rows]) and hostile.same_bits(spoiled_lse, lse)


def test_larger_heads_are_refused_by_every_launcher(kernels):
    """The operators refuse them before, in words."""
    cache_format: CacheFormat = FORMATS["k6v4"]
    batch = hostile.make_batch([(1, 20)], num_heads=2, head_size=144, dtype=torch.float16, cache_format=cache_format)
    key = torch.zeros(2, 2, 144)
    with pytest.raises(AssertionError):
        write(kernels, MODES[0], batch.kv_cache, key, key, torch.tensor([0, 1]), cache_format=cache_format)
    place = batch.block_table, batch.query_start_loc, batch.seq_lens
    with pytest.raises(AssertionError):
        emulated_cuda.gather_cache(kernels, key, key, batch.kv_cache, *place, cache_format=cache_format)
    with pytest.raises(AssertionError):
        emulated_cuda.paged_attention(kernels, batch, softmax_scale=0.1, cache_format=cache_format)

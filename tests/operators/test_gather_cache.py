"""The way back from the cache to floats: bits of the reference, on every device."""

import pytest
import torch
from hostile import gather_args, make_batch, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.formats import FORMATS, K8V8
from vllm_int8kv.cache.key_transform import KeyTransform


def stretches(batch, *stretch):
    """block_table, cu_seq_lens and seq_starts of (first position, length) per sequence."""
    starts, lens = (
        torch.tensor(x, dtype=torch.int32, device=batch.kv_cache.device) for x in zip(*stretch, strict=True)
    )
    return batch.block_table, torch.nn.functional.pad(lens.cumsum(0), (1, 0)).int(), starts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_size, block_size", [(32, 16), (64, 144), (80, 16), (128, 32), (256, 16), (512, 48)])
def test_bits_of_the_reference(kernel, head_size, block_size, dtype):
    equalizer = 2.0 ** torch.randint(-3, 4, (3, head_size)).float() * 1.1
    for options in (
        {},
        {"key_transform": KeyTransform(rotate=False)},
        {"key_transform": KeyTransform(equalizer=equalizer)},
    ):
        sizes = {"num_heads": 3, "num_kv_heads": 3, "head_size": head_size, "block_size": block_size}
        batch = make_batch([(1, 300), (1, 17), (1, 150)], **sizes, **options, outliers=True)
        # The first stretch ends within a block, the second is empty, the third is all there is.
        place = stretches(batch, (33, 200), (5, 0), (0, 150))
        # A gap after each row of V and an odd first element; ten rows are nobody's.
        want = torch.full((360, 3, head_size), 7.0, dtype=dtype), torch.full((360, 3, head_size + 1), 7.0, dtype=dtype)
        got = tuple(x.to(kernel, copy=True) for x in want)
        reference.gather_cache(want[0], want[1][..., 1:], batch.kv_cache, *place, **options, cache_format=K8V8)
        there = make_batch([(1, 300), (1, 17), (1, 150)], **sizes, **options, outliers=True, device=kernel)
        if options.get("key_transform", KeyTransform()).equalizer is not None:
            options = {"key_transform": KeyTransform(equalizer=equalizer.to(kernel))}
        ops.gather_cache(
            got[0], got[1][..., 1:], there.kv_cache, *(x.to(kernel) for x in place), **options, cache_format=K8V8
        )
        assert same_bits(got[0].cpu(), want[0]) and same_bits(got[1].cpu(), want[1])
        assert (want[0][350:] == 7.0).all() and (want[0][:350] != 7.0).any()


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "k8v8"])
def test_bits_of_the_reference_of_formats(kernel, name):
    for head_size, block_size in ((64, 16), (80, 48), (128, 32)):
        sizes = {"num_heads": 2, "num_kv_heads": 2, "head_size": head_size, "block_size": block_size}
        batch = make_batch([(1, 90), (1, 33)], **sizes, outliers=True, cache_format=FORMATS[name])
        place = stretches(batch, (7, 80), (0, 33))
        for dtype in (torch.float32, torch.bfloat16):
            want = torch.zeros(2, 113, 2, head_size, dtype=dtype)
            got = torch.zeros_like(want, device=kernel)
            reference.gather_cache(*want, batch.kv_cache, *place, cache_format=FORMATS[name])
            there = [x.to(kernel) for x in (batch.kv_cache, *place)]
            ops.gather_cache(*got, *there, cache_format=FORMATS[name])
            assert same_bits(got.cpu(), want)


def test_fp16_from_zero_to_infinity(kernel):
    """Every scale from what rounds to 0, over the subnormal numbers, to what overflows."""
    kv = torch.randn(2, 320, 2, 64) * torch.logspace(-10, 7, 320)[:, None, None]
    kv_cache = K8V8.allocate(20, 2, 16, 64)
    reference.reshape_and_cache(*kv, kv_cache, torch.arange(320), cache_format=K8V8)
    place = [torch.tensor(x, dtype=torch.int32) for x in ([range(20)], [0, 320], [0])]
    want = torch.empty(2, 320, 2, 64, dtype=torch.float16)
    reference.gather_cache(*want, kv_cache, *place, cache_format=K8V8)
    got = torch.empty_like(want, device=kernel)
    ops.gather_cache(*got, kv_cache.to(kernel), *(x.to(kernel) for x in place), cache_format=K8V8)
    assert same_bits(got.cpu(), want)
    magnitude = want.float().abs()
    assert (magnitude == 0).any() and ((magnitude > 0) & (magnitude < 2.0**-14)).any() and magnitude.isinf().any()


def test_it_is_what_was_written(device):
    """Close to the keys and values themselves: rotation and equalizer are undone."""
    equalizer = torch.linspace(0.5, 2.0, 128).view(2, 64)
    batch = make_batch([(1, 77)], key_transform=KeyTransform(equalizer=equalizer), device=device)
    got = torch.empty(2, 77, 2, 64, device=device)
    ops.gather_cache(
        *got,
        batch.kv_cache,
        *stretches(batch, (0, 77)),
        key_transform=KeyTransform(equalizer=equalizer.to(device)),
        cache_format=K8V8,
    )
    for x, written in zip(got.cpu(), (batch.keys[0], batch.values[0]), strict=True):
        assert (x - written).norm() / written.norm() < 0.01


def test_nothing_to_gather(device):
    args = gather_args(device)
    for name, n in (("block_table", 0), ("cu_seq_lens", 1), ("seq_starts", 0)):
        args[name] = args[name][:n]
    ops.gather_cache(**args, cache_format=K8V8)
    assert not args["key"].any()
    args = gather_args(device)
    ops.gather_cache(
        **{**args, "key": args["key"][:0], "value": args["value"][:0], "cu_seq_lens": 0 * args["cu_seq_lens"]},
        cache_format=K8V8,
    )


small = st.sampled_from([-(2**31), -1, 0, 0, 1, 2, 7, 8, 9, 16, 31, 32, 2**31 - 1])


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    block_table=st.lists(st.sampled_from([-1, 0, 1, 2, 2, 3, 2**31 - 1]), min_size=4, max_size=4),
    cu_seq_lens=st.lists(st.sampled_from([-1, 0, 0, 1, 4, 7, 8, 9]), min_size=3, max_size=3),
    seq_starts=st.lists(small, min_size=2, max_size=2),
)
def test_any_integers_are_gathered_or_refused(block_table, cu_seq_lens, seq_starts):
    args = gather_args()
    for name, values in (("cu_seq_lens", cu_seq_lens), ("seq_starts", seq_starts)):
        args[name] = torch.tensor(values, dtype=torch.int32)
    args["block_table"] = torch.tensor(block_table, dtype=torch.int32).reshape(2, 2)
    valid = cu_seq_lens[0] == 0
    for seq, start in enumerate(seq_starts):
        begin, end = cu_seq_lens[seq : seq + 2]
        blocks = range(start // 16, -(-(start + end - begin) // 16)) if begin < end else ()
        valid &= begin <= end <= 8 and start >= 0
        valid &= all(0 <= i < 2 and 0 <= block_table[2 * seq + i] < 3 for i in blocks)
    if valid:
        ops.gather_cache(**args, cache_format=K8V8)
        assert args["key"].isfinite().all() and not args["key"][cu_seq_lens[2] :].any()
    else:
        with pytest.raises(RuntimeError, match=r"block_table|cu_seq_lens|seq_starts"):
            ops.gather_cache(**args, cache_format=K8V8)

"""The CUDA kernels, run on the host thread by thread (cuda_emulation.h): what they compute, without a GPU.

The same hostile inputs and tolerances as for every other kernel; small shapes, since a warp here is 32 fibers.
"""

from dataclasses import replace

import emulated_cuda
import hostile
import pytest
import torch
from emulated_cuda import BLOCKS, MODES, OPTIONS, check

from vllm_int8kv.cache import reference
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform


@pytest.mark.parametrize(
    "head_size, dtype",
    [
        (32, torch.float32),
        (80, torch.bfloat16),
        (128, torch.float16),
        (192, torch.bfloat16),
        (256, torch.float32),
        (512, torch.float16),
    ],
)
def test_cache_write_is_bit_equal(kernels, head_size, dtype):
    num_kv_heads, block_size = 2, 48
    # A full group off the token grid, a group cut short by padding, single tokens, a group across -1.
    slot_mapping = torch.tensor(
        [200, -1, 5, *range(32, 59), -1, 144, 145, 147, *range(96, 112), 112, 7, *range(160, 175), -1, 250]
    )
    qkv = torch.randn(len(slot_mapping), 3, num_kv_heads, head_size).to(dtype)
    qkv[3, 1, 0, 5], qkv[4, 2, 1] = torch.nan, 0.0
    qkv[6, 1, 1, 2:4] = torch.inf
    key, value = qkv[:, 1], qkv[:, 2]
    powers = 2.0 ** torch.randint(-6, 7, (num_kv_heads, head_size))
    # One of a head is no power of two, one is too large, one is negative; the other head is plain.
    mixed, huge, negative = powers.clone(), powers.clone(), powers.clone()
    mixed[0, 17], huge[0, 9], negative[0, 3] = 3.0, 2.0**40, -0.5
    equalizers = [None, torch.rand(num_kv_heads, head_size) + 0.5, powers, mixed, huge, negative]
    transforms = [KeyTransform(rotate=False), *(KeyTransform(equalizer=x) for x in equalizers)]
    for i, key_transform in enumerate(transforms):
        options = {"cache_format": K8V8, "key_transform": key_transform}
        kernels.set_mode(*MODES[i % 2], BLOCKS[i % 3])
        got = hostile.garbage_cache(6, num_kv_heads, block_size, head_size)
        want = got.clone()
        emulated_cuda.reshape_and_cache(kernels, key, value, got, slot_mapping, **options)
        reference.reshape_and_cache(key, value, want, slot_mapping, **options)
        assert hostile.same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cache_write_of_many_heads_and_odd_addresses(kernels, dtype):
    """A block takes several KV heads where a device holds few blocks; rows that do not start on 16 bytes."""
    slot_mapping = torch.tensor([*range(64, 80), 3, *range(16, 32), -1, 9])
    key, value = torch.randn(2, len(slot_mapping), 5, 65).to(dtype)[..., 1:]
    key[2, 3], key[9, 1, 5], value[20, 4, 1] = 1e25, torch.nan, torch.inf
    equalizer = (2.0 ** torch.randint(-3, 4, (5 * 64 + 1,)))[1:].view(5, 64)
    for num_blocks in (1, 3, 20):
        for key_transform in (KeyTransform(), KeyTransform(equalizer=equalizer)):
            kernels.set_mode(1, 1, 1, num_blocks)
            options = {"cache_format": K8V8, "key_transform": key_transform}
            got = hostile.garbage_cache(3, 5, 32, 64)
            want = got.clone()
            emulated_cuda.reshape_and_cache(kernels, key, value, got, slot_mapping, **options)
            reference.reshape_and_cache(key, value, want, slot_mapping, **options)
            assert hostile.same_bits(got, want)


@pytest.mark.parametrize(
    "head_size, dtype", [(32, torch.float32), (80, torch.bfloat16), (192, torch.float16), (512, torch.bfloat16)]
)
def test_gather_is_bit_equal(kernels, head_size, dtype):
    sizes = {"num_kv_heads": 2, "head_size": head_size, "block_size": 48}
    batch = hostile.make_batch([(1, 70), (1, 5), (1, 130)], num_heads=2, **sizes, outliers=True)
    # From the middle of a block across its end, nothing, and everything.
    ints = ([0, 60, 60, 190], [9, 2, 0])
    place = batch.block_table, *(torch.tensor(x, dtype=torch.int32) for x in ints)
    equalizer = torch.rand(2, head_size) + 0.5
    transforms = KeyTransform(rotate=False), KeyTransform(equalizer=equalizer)
    for mode, key_transform in zip(MODES, transforms, strict=True):
        options = {"cache_format": K8V8, "key_transform": key_transform}
        kernels.set_mode(*mode, BLOCKS[0])
        # One of the two starts on an odd element and has gaps between its rows.
        got = torch.full((200, 2, head_size), -7.0, dtype=dtype), torch.full((200, 2, head_size + 1), -7.0, dtype=dtype)
        want = tuple(x.clone() for x in got)
        emulated_cuda.gather_cache(kernels, got[0], got[1][..., 1:], batch.kv_cache, *place, **options)
        reference.gather_cache(want[0], want[1][..., 1:], batch.kv_cache, *place, **options)
        for x, y in zip(got, want, strict=True):
            assert hostile.same_bits(x, y)


def test_gather_of_short_stretches(kernels):
    """Slot groups are numbered by bounds, not by sums: stretches of all lengths, from all places within a group."""
    generator = torch.Generator().manual_seed(3)
    lens = [0, 1, 2, 15, 16, 17, 31, 32, 33, 40, 0, 5]
    batch = hostile.make_batch([(1, 90)] * len(lens), num_heads=1, num_kv_heads=1, head_size=32)
    bounds = torch.tensor([0, *lens]).cumsum(0).int()
    for _ in range(8):
        starts = torch.tensor([int(torch.randint(0, 90 - n, (1,), generator=generator)) for n in lens]).int()
        got = torch.full((230, 1, 32), -7.0), torch.full((230, 1, 32), -7.0)
        want = tuple(x.clone() for x in got)
        place = batch.kv_cache, batch.block_table, bounds, starts
        emulated_cuda.gather_cache(kernels, *got, *place, cache_format=K8V8)
        reference.gather_cache(*want, *place, cache_format=K8V8)
        assert hostile.same_bits(got[0], want[0]) and hostile.same_bits(got[1], want[1])


def test_quotients_of_the_quantizer_are_those_of_division(kernels):
    """x / 127 for every mantissa, 1 / scale for every bf16 number in [1, 2) from approximations a few units off, and
    x / scale for these scales."""
    assert kernels.wrong_quotients() == 0


LENS = [(1, 1), (1, 65), (1, 600), (5, 18), (3, 290), (19, 70), (17, 17)]


@pytest.mark.parametrize(
    "dtype, head_size, num_heads, num_kv_heads, block_size",
    [
        (torch.float32, 80, 7, 1, 16),
        (torch.float32, 512, 2, 1, 32),
        (torch.float16, 32, 3, 1, 48),
        (torch.bfloat16, 64, 8, 2, 16),
        (torch.float16, 80, 7, 1, 16),
        (torch.bfloat16, 128, 4, 4, 32),
        (torch.float16, 176, 10, 1, 64),
        (torch.bfloat16, 256, 2, 1, 16),
    ],
)
def test_mixed_batches(kernels, head_size, num_heads, num_kv_heads, block_size, dtype):
    batch = hostile.make_batch(
        LENS,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        outliers=head_size == 128,
    )
    check(kernels, batch, softmax_scale=0.004 if head_size == 128 else head_size**-0.5)


def test_a_decode_batch(kernels):
    """One token each: the kernel with one row tile, and the same bits as in a batch that needs two."""
    lens = [(1, 300), (1, 9), (1, 64)]
    batch = hostile.make_batch(lens, dtype=torch.bfloat16, head_size=128)
    for num_blocks in BLOCKS:
        out, _ = check(kernels, replace(batch, query=batch.query[:3]), num_blocks, softmax_scale=0.09)
        padded, _ = check(kernels, batch, num_blocks, softmax_scale=0.09)
        assert hostile.same_bits(out, padded[:3])


def test_a_batch_of_nothing(kernels):
    batch = hostile.make_batch([(1, 300)], dtype=torch.bfloat16)
    empty = torch.zeros(0, dtype=torch.int32)
    for nothing in (
        replace(batch, query=batch.query[:0]),
        replace(batch, query=batch.query[:0], seq_lens=empty, query_start_loc=torch.zeros(1, dtype=torch.int32)),
    ):
        assert emulated_cuda.workspace_bytes(kernels, nothing, cache_format=K8V8) == 0
        out, lse = emulated_cuda.paged_attention(kernels, nothing, softmax_scale=0.125, cache_format=K8V8)
        assert len(out) == lse.shape[1] == 0


def test_more_queries_than_keys(kernels):
    for dtype in (torch.float32, torch.float16):
        batch = hostile.make_batch([(6, 2), (20, 17)], dtype=dtype)
        check(kernels, batch, softmax_scale=0.125, causal=False, sliding_window=4)
        check(kernels, batch, softmax_scale=0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(kernels, name, dtype):
    options = OPTIONS[name]
    key_transform = options.get("key_transform", KeyTransform())
    lens = [(1, 400), (4, 530), (20, 70)]
    batch = hostile.make_batch(lens, num_heads=6, dtype=dtype, key_transform=key_transform)
    check(kernels, batch, softmax_scale=0.125, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("num_blocks", [12, 13, 23, 67])
def test_splits_are_merged_in_groups(kernels, num_blocks, dtype):
    """One group, two, three and six; of the last group a part, and shares that hold whole items beside splits."""
    length = num_blocks * 8 * 64 - 4 * 64 - 37  # a share is at least 8 tiles of 64 keys, an item costs 4
    sizes = {"num_heads": 3, "num_kv_heads": 1, "head_size": 32, "dtype": dtype}
    check(kernels, hostile.make_batch([(1, length)], **sizes), num_blocks, softmax_scale=0.2, sinks=torch.ones(3))
    lens = [(2, 200), (1, length * 3 // 4), (1, 70), (1, length // 2)]
    check(kernels, hostile.make_batch(lens, **sizes), num_blocks, softmax_scale=0.2)


def test_more_sequences_than_threads(kernels):
    batch = hostile.make_batch([(1, 1 + i % 5) for i in range(150)], num_heads=2, num_kv_heads=1, dtype=torch.float16)
    for num_blocks in BLOCKS:
        check(kernels, batch, num_blocks, softmax_scale=0.125)


def test_sequences_without_queries(kernels):
    """As the padding of a CUDA graph is: the second 128 of 300 sequences have no work, others next to some that do."""
    lens = [(0 if 128 <= i < 256 or i % 7 == 3 else 1, i % 90) for i in range(300)]
    batch = hostile.make_batch(lens, num_heads=2, num_kv_heads=1, dtype=torch.float16)
    for num_blocks in BLOCKS:
        check(kernels, batch, num_blocks, softmax_scale=0.125)


def test_v_scales_of_every_magnitude(kernels):
    batch = hostile.make_batch([(1, 200)], dtype=torch.float16)
    batch.values[0].mul_(10.0 ** torch.linspace(-6, 3, 200)[:, None, None])
    slots = batch.block_table[0, :13].long()[:, None] * 16 + torch.arange(16)
    reference.reshape_and_cache(
        batch.keys[0], batch.values[0], batch.kv_cache, slots.flatten()[:200], cache_format=K8V8
    )
    check(kernels, batch, softmax_scale=0.125)


@pytest.mark.parametrize("name", ["plain", "sliding-window", "non-causal-window", "softcap", "alibi", "sinks"])
@pytest.mark.parametrize("head_size", [48, 64, 80, 128])
def test_many_rows_in_one_pass(kernels, head_size, name):
    """More than 16 query rows per KV head, on a GPU with shared memory for four row tiles: same answers as with two."""
    options = {"softmax_scale": 0.1} | OPTIONS.get(name, {})
    lens = [(9, 500), (1, 70), (14, 14), (12, 330)]
    batch = hostile.make_batch(lens, num_heads=6, head_size=head_size, dtype=torch.bfloat16)
    batch.values[0].mul_(10.0 ** torch.linspace(-6, 3, 500)[:, None, None])  # the scale of the weights grows
    slots = batch.block_table[0, :32].long()[:, None] * 16 + torch.arange(16)
    reference.reshape_and_cache(
        batch.keys[0], batch.values[0], batch.kv_cache, slots.flatten()[:500], cache_format=K8V8
    )
    sizes = []
    for shared_bytes in (48 << 10, 99 << 10):  # Turing has 64 KiB, which holds four of head_size 64
        kernels.set_shared_bytes(shared_bytes)
        for num_blocks in BLOCKS:
            check(kernels, batch, num_blocks, **options)
        sizes.append(emulated_cuda.workspace_bytes(kernels, batch, cache_format=K8V8))
    kernels.set_shared_bytes(64 << 10)
    assert sizes[1] > 1.9 * sizes[0], "four row tiles were not taken"


def test_shared_memory_fits_every_gpu(kernels):
    """A launch that asks for more than Turing's 64 KiB returns an error, so this shape runs nowhere smaller."""
    batch = hostile.make_batch([(2, 70)], num_heads=16, num_kv_heads=1, head_size=256, dtype=torch.float16)
    check(kernels, batch, softmax_scale=0.0625)


@pytest.mark.parametrize("sinks", [None, torch.linspace(-3.0, 6.0, 6)], ids=["", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_query_that_is_not_finite_spoils_no_other(kernels, dtype, sinks):
    batch = hostile.make_batch([(1, 500), (3, 130)], num_heads=6, dtype=dtype)
    kernels.set_mode(*MODES[0], BLOCKS[2])
    options = {"softmax_scale": 0.125, "sinks": sinks, "cache_format": K8V8}
    out, lse = emulated_cuda.paged_attention(kernels, batch, **options)
    query = batch.query.clone()
    query[0, 2, 5], query[2, 0, 0] = torch.nan, torch.inf
    spoiled = replace(batch, query=query)
    spoiled_out, spoiled_lse = emulated_cuda.paged_attention(kernels, spoiled, **options)
    for token, head in ((0, 2), (2, 0)):
        assert spoiled_out[token, head].isnan().all() and spoiled_lse[head, token].isnan()
        spoiled_out[token, head], spoiled_lse[head, token] = out[token, head], lse[head, token]
    rows = slice(0, batch.num_tokens)
    assert hostile.same_bits(spoiled_out[rows], out[rows]) and hostile.same_bits(spoiled_lse, lse)


def test_checks_of_slots(kernels):
    rows = torch.zeros(3, 2, 64)
    cache = K8V8.allocate(4, 2, 16, 64)
    options = {"cache_format": K8V8, "only_check": True}
    for slots, found in (([0, -1, 63], ""), ([0, 64, -1], "slot_mapping[1] is 64 but kv_cache has 64 slots")):
        assert emulated_cuda.reshape_and_cache(kernels, rows, rows, cache, torch.tensor(slots), **options) == found


def changed(values: torch.Tensor, place, value: int) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


@pytest.mark.parametrize(
    "name, place, value, found",
    [
        ("block_table", (1, 0), 99, "block_table[1, 0] is 99, which kv_cache does not have"),
        ("block_table", (0, 6), -1, "block_table[0, 6] is -1, which kv_cache does not have"),
        ("seq_lens", 0, 5000, "sequence 0 reads up to position 5000 but block_table has"),
        ("seq_lens", 1, 1, "sequence 1 has 3 query tokens but seq_lens says 1"),
        ("query_start_loc", 0, 1, "query_start_loc must start at 0, not decrease and not exceed"),
        ("query_start_loc", 2, 90, "query_start_loc must start at 0, not decrease and not exceed"),
        ("query_start_loc", 1, 9, "query_start_loc must start at 0, not decrease and not exceed"),
    ],
)
def test_checks_of_attention(kernels, name, place, value, found):
    batch = hostile.make_batch([(1, 100), (3, 40)])
    options = {"softmax_scale": 0.1, "cache_format": K8V8, "only_check": True}
    assert emulated_cuda.paged_attention(kernels, batch, **options) == ""
    wrong = replace(batch, **{name: changed(getattr(batch, name), place, value)})
    assert emulated_cuda.paged_attention(kernels, wrong, **options).startswith(found)
    if name == "block_table":  # blocks that no query sees may be anything
        windowed = emulated_cuda.paged_attention(kernels, wrong, sliding_window=5, **options)
        assert (windowed == "") == (place == (1, 0))


@pytest.mark.parametrize(
    "bounds, starts, found",
    [
        ([0, 9, 19], [50, 0], ""),
        ([0, 9, 19], [-1, 0], "seq_starts[0] must not be negative, got -1"),
        ([0, 9, 19], [50, 5000], "sequence 1 reads up to position 5010 but block_table has"),
        ([0, 12, 9], [0, 0], "cu_seq_lens must start at 0, not decrease and not exceed the rows of key; sequence 1"),
    ],
)
def test_checks_of_gather(kernels, bounds, starts, found):
    batch = hostile.make_batch([(1, 100), (3, 40)])
    rows = torch.zeros(20, 2, 64)
    place = batch.block_table, torch.tensor(bounds).int(), torch.tensor(starts).int()
    options = {"cache_format": K8V8, "only_check": True}
    got = emulated_cuda.gather_cache(kernels, rows, rows, batch.kv_cache, *place, **options)
    assert got.startswith(found) and (got == "") == (found == "")

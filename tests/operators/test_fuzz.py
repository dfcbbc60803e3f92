"""Fuzzed operators: any argument raises an error that names it or is defined behaviour, and nothing else is touched.

On every kernel path. The cache is a window of a larger tensor whose other bytes must stay as they are; under
`make sanitize` reads outside of a tensor end the run too. `make fuzz` does so with more examples and records what came
of them.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hostile import gather_args, read_args, same_bits, write_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_int8kv.cache import ladder, library, ops, reference
from vllm_int8kv.cache.formats import FORMATS, K8V8, CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE = 4, 2, 16, 32
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 150)),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD_FLOATS = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3e38, -65504.0, 1.0, -2.5])
ARGUMENTS = {
    "reshape_and_cache": "key|value|kv_cache|slot_mapping",
    "paged_attention": "query|kv_cache|block_table|seq_lens|query_start_loc|out",
    "gather_cache": "key|value|kv_cache|block_table|cu_seq_lens|seq_starts",
    "quantize_per_channel": "x|codes|scales",
    "dequantize_per_channel": "x|codes|scales",
}
"""What the operators call their arguments; the wrappers' `out` is one of them."""
OUTCOMES: Counter[tuple[str, str]] = Counter()
"""(operator, "computed" or the argument that an error named) of all calls."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool]


def refused(operator: str, error: Exception) -> None:
    """Count an error; it must name an argument of the operator."""
    named = re.search(rf"\b({ARGUMENTS[operator]})\b", str(error))
    assert named, error
    OUTCOMES[operator, named[1]] += 1


@pytest.fixture(autouse=True)
def one_thread(set_num_threads) -> Iterator[None]:
    set_num_threads(1)
    isa = library.cpu_isa()
    yield
    library.set_cpu_isa(isa)


def guarded_cache(offset: int, cache_format: CacheFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """(storage, cache within it); `offset` bytes from its start, aligned to nothing."""
    cache = cache_format.allocate(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    storage = torch.full((cache.numel() + offset + 33,), 77, dtype=torch.int8)
    view = storage[offset : offset + cache.numel()].view(cache.shape)
    return storage, view.copy_(cache)


def outside(storage: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    start = cache.storage_offset()
    return torch.cat([storage[:start], storage[start + cache.numel() :]])


slots = st.one_of(
    st.integers(-(2**63), -1),
    st.integers(0, NUM_BLOCKS * BLOCK_SIZE - 1),
    st.integers(NUM_BLOCKS * BLOCK_SIZE, 2**63 - 1),
)


@FUZZ
@given(
    slot_list=st.lists(slots, max_size=24),
    offset=st.integers(0, 17),
    dtype=st.sampled_from(DTYPES[:3]),
    odd=st.lists(ODD_FLOATS, min_size=1, max_size=8),
    rotate=st.booleans(),
    isa=st.sampled_from(library.cpu_isas()),
    name=st.sampled_from(list(FORMATS)),
)
def test_writes_the_mapped_slots_or_refuses(slot_list, offset, dtype, odd, rotate, isa, name):
    library.set_cpu_isa(isa)
    num_tokens = len(slot_list)
    cache_format = FORMATS[name]
    storage, cache = guarded_cache(offset, cache_format)
    key, value = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_SIZE).to(dtype)
    for i, x in enumerate(odd):
        if num_tokens:
            key.view(-1)[(i * 37) % key.numel()] = x
            value.view(-1)[(i * 53) % value.numel()] = x
    mapping = torch.tensor(slot_list, dtype=torch.int64)
    before = storage.clone()
    if any(slot >= NUM_BLOCKS * BLOCK_SIZE for slot in slot_list):
        with pytest.raises(RuntimeError, match=r"slot_mapping\[\d+\] is \d+ but kv_cache has 64 slots") as caught:
            ops.reshape_and_cache(
                key, value, cache, mapping, key_transform=KeyTransform(rotate=rotate), cache_format=cache_format
            )
        refused("reshape_and_cache", caught.value)
        assert same_bits(storage, before)
        return
    kept = [slot for slot in slot_list if slot >= 0]
    ops.reshape_and_cache(
        key, value, cache, mapping, key_transform=KeyTransform(rotate=rotate), cache_format=cache_format
    )
    OUTCOMES["reshape_and_cache", "computed"] += 1
    assert (outside(storage, cache) == 77).all()
    if len(set(kept)) == len(kept):  # of two equal slots one of the vectors stays, whichever
        want = cache_format.allocate(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
        reference.reshape_and_cache(
            key, value, want, mapping, key_transform=KeyTransform(rotate=rotate), cache_format=cache_format
        )
        assert same_bits(cache, want)


@FUZZ
@given(
    blocks=st.lists(st.one_of(st.integers(-(2**31), -1), st.integers(0, 3), st.integers(4, 2**31 - 1)), max_size=6),
    seq_lens=st.lists(st.integers(-3, 70), min_size=1, max_size=3),
    query_lens=st.lists(st.integers(-2, 9), min_size=1, max_size=3),
    num_tokens=st.integers(0, 12),
    sliding_window=st.one_of(st.none(), st.integers(1, 40), st.just(2**31 - 1)),
    causal=st.booleans(),
    offset=st.integers(0, 17),
    isa=st.sampled_from(library.cpu_isas()),
    name=st.sampled_from(list(FORMATS)),
)
def test_reads_the_named_blocks_or_refuses(
    blocks, seq_lens, query_lens, num_tokens, sliding_window, causal, offset, isa, name
):
    library.set_cpu_isa(isa)
    cache_format = FORMATS[name]
    storage, cache = guarded_cache(offset, cache_format)
    kv = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE)
    ops.reshape_and_cache(*kv, cache, torch.arange(NUM_BLOCKS * BLOCK_SIZE), cache_format=cache_format)
    num_seqs = len(seq_lens)
    width = max(len(blocks) // num_seqs, 0)
    table = torch.tensor(blocks[: width * num_seqs], dtype=torch.int32).view(num_seqs, width)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    query, out = torch.randn(num_tokens, 4, HEAD_SIZE), torch.full((num_tokens, 4, HEAD_SIZE), 5.0)
    args = (query, cache, table, torch.tensor(seq_lens, dtype=torch.int32), starts)
    options = dict(softmax_scale=0.2, causal=causal, sliding_window=sliding_window)
    before = storage.clone()
    try:
        ops.paged_attention(*args, out=out, **options, cache_format=cache_format)
    except RuntimeError as error:
        refused("paged_attention", error)
        assert (out == 5).all()
    else:
        OUTCOMES["paged_attention", "computed"] += 1
        end = int(starts[-1])
        # Nobody asks for the blocks of sequences without queries, but the reference reads them.
        table[torch.tensor(query_lens[:num_seqs]) == 0] = 0
        want, _ = reference.paged_attention(*args, **options, cache_format=cache_format)
        torch.testing.assert_close(out[:end], want[:end].float(), atol=2e-3, rtol=2e-3)
        assert (out[end:] == 5).all()
    assert same_bits(storage, before)


@FUZZ
@given(
    blocks=st.lists(st.one_of(st.integers(-(2**31), -1), st.integers(0, 3), st.integers(4, 2**31 - 1)), max_size=6),
    seq_starts=st.lists(st.one_of(st.integers(-3, 70), st.just(2**31 - 1)), min_size=1, max_size=3),
    lens=st.lists(st.integers(-2, 40), min_size=1, max_size=3),
    num_rows=st.integers(0, 60),
    dtype=st.sampled_from(DTYPES[:3]),
    rotate=st.booleans(),
    offset=st.integers(0, 17),
    name=st.sampled_from(list(FORMATS)),
)
def test_gathers_the_named_blocks_or_refuses(blocks, seq_starts, lens, num_rows, dtype, rotate, offset, name):
    cache_format = FORMATS[name]
    storage, cache = guarded_cache(offset, cache_format)
    kv = torch.randn(2, NUM_BLOCKS * BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE)
    ops.reshape_and_cache(*kv, cache, torch.arange(NUM_BLOCKS * BLOCK_SIZE), cache_format=cache_format)
    num_seqs = len(seq_starts)
    width = len(blocks) // num_seqs
    table = torch.tensor(blocks[: width * num_seqs], dtype=torch.int32).view(num_seqs, width)
    cu_seq_lens = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    rows = torch.full((2, num_rows, NUM_KV_HEADS, HEAD_SIZE), 5.0, dtype=dtype)
    args = (cache, table, cu_seq_lens, torch.tensor(seq_starts, dtype=torch.int32))
    options = {"cache_format": cache_format, "key_transform": KeyTransform(rotate=rotate)}
    before = storage.clone()
    try:
        ops.gather_cache(*rows, *args, **options)
    except RuntimeError as error:
        refused("gather_cache", error)
        assert (rows == 5).all()
    else:
        OUTCOMES["gather_cache", "computed"] += 1
        want = torch.full_like(rows, 5.0)
        reference.gather_cache(*want, *args, **options)
        assert same_bits(rows, want)
    assert same_bits(storage, before)


def damage(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """A tensor that is wrong in one way, or the same values in another shape of storage."""
    if how in ("transposed", "flat", "longer", "empty"):
        return {
            "transposed": lambda: tensor.transpose(0, -1),
            "flat": lambda: tensor.flatten(),
            "longer": lambda: torch.cat([tensor, tensor]),
            "empty": lambda: tensor[:0],
        }[how]()
    if how == "strided":
        return tensor.repeat_interleave(2, dim=0)[::2]
    if how == "expanded":
        return tensor[:1].expand(tensor.shape)
    if how == "meta":
        return tensor.to("meta")
    return tensor.to(getattr(torch, how))


DAMAGES = ["transposed", "flat", "longer", "empty", "strided", "expanded", "meta"]
DAMAGES += [str(dtype).removeprefix("torch.") for dtype in DTYPES]


def quantize_args() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(6, 40), "scales": torch.rand(40) + 0.1, "out": torch.empty(6, 40, dtype=torch.int8)}


def dequantize_args() -> dict[str, torch.Tensor]:
    codes = torch.randint(-127, 128, (6, 40), dtype=torch.int8)
    return {"codes": codes, "scales": torch.rand(40) + 0.1, "out": torch.empty(6, 40)}


def with_format(make_args: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {**make_args(), "cache_format": K8V8}


DAMAGEABLE = {
    ops.reshape_and_cache: (with_format(write_args), ("key", "value", "kv_cache", "slot_mapping")),
    ops.paged_attention: (
        with_format(read_args),
        ("query", "kv_cache", "block_table", "seq_lens", "query_start_loc"),
    ),
    ops.gather_cache: (
        with_format(gather_args),
        ("key", "value", "kv_cache", "block_table", "cu_seq_lens", "seq_starts"),
    ),
    ladder.quantize_per_channel: (quantize_args, ("x", "scales", "out")),
    ladder.dequantize_per_channel: (dequantize_args, ("codes", "scales", "out")),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize(
    ("operator", "name"),
    [(operator, name) for operator, (_, names) in DAMAGEABLE.items() for name in names],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_argument(operator, name, how):
    """An error that says what is wrong with which argument, or a result like any other."""
    make_args, _ = DAMAGEABLE[operator]
    args = make_args()
    try:
        operator(**args | {name: damage(args[name], how)})
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error).lower():
            refused(operator.__name__, error)
        else:
            OUTCOMES[operator.__name__, "device"] += 1
    else:
        OUTCOMES[operator.__name__, "computed"] += 1

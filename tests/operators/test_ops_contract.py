"""What the operators promise PyTorch and their callers: schemas, empty inputs, odd addresses, any arguments."""

import threading

import pytest
import torch
from hostile import assert_attention_close, gather_args, make_batch, read_args, same_bits, write_args
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.formats import FORMATS, K8V8


def test_opcheck_reshape_and_cache(device):
    for key_equalizer in (None, torch.ones(2, 64, device=device)):
        args = (*write_args(device).values(), K8V8.name, True, key_equalizer)
        torch.library.opcheck(torch.ops.int8kv.reshape_and_cache.default, args)


def test_opcheck_gather_cache(device):
    for key_equalizer in (None, torch.ones(2, 64, device=device)):
        args = (*gather_args(device).values(), K8V8.name, True, key_equalizer)
        torch.library.opcheck(torch.ops.int8kv.gather_cache.default, args)


@pytest.mark.parametrize("with_options", [False, True])
def test_opcheck_paged_attention(device, with_options):
    args = read_args(device)
    softmax_scale = args.pop("softmax_scale")
    out, lse, per_head = torch.zeros(4, 4, 64, device=device), torch.zeros(4, 4, device=device), torch.ones(4)
    options = (lse, per_head.to(device), per_head.to(device)) if with_options else (None,) * 3
    equalizer = torch.ones(2, 64, device=device) if with_options else None
    positional = (out, *args.values(), *options, K8V8.name, True, equalizer, softmax_scale, True, 0, 0.0)
    torch.library.opcheck(torch.ops.int8kv.paged_attention.default, positional)


@pytest.mark.parametrize("cache_format", [K8V8, FORMATS["k6v4"]], ids=lambda cache_format: cache_format.name)
def test_operators_let_the_interpreter_go_on(cache_format):
    """The store calls them beside the steps of an engine."""
    num_tokens, num_heads, head_size, block_size = 16384, 8, 128, 128
    key = torch.randn(num_tokens, num_heads, head_size)
    cache = cache_format.allocate(num_tokens // block_size, num_heads, block_size, head_size, "cpu")
    slots = torch.arange(num_tokens)
    turns = 0
    caller = threading.Thread(
        target=ops.reshape_and_cache, args=(key, key, cache, slots), kwargs={"cache_format": cache_format}
    )
    caller.start()
    while caller.is_alive():
        turns += 1
    # With the lock held for tens of milliseconds there would be a handful, before and after.
    assert turns > 1000


def test_kernels_are_prepared_for_a_query_and_a_cache(device):
    """What comes back is for GPUs alone."""
    args = read_args(device)
    arrivals = ops.prepare_paged_attention(args["query"], args["kv_cache"], cache_format=K8V8)
    empty = args["query"][:0], K8V8.allocate(0, 2, 16, 64, device)
    same = ops.prepare_paged_attention(*empty, cache_format=K8V8)
    if arrivals is None:
        assert same is None and str(device) == "cpu"
        with pytest.raises(RuntimeError, match="arrivals are for GPUs, the cache is on the CPU"):
            ops.paged_attention(**args, cache_format=K8V8, arrivals=torch.zeros(3, dtype=torch.int32))
    else:
        assert len(same) == len(arrivals) and not arrivals.any()
        want = ops.paged_attention(**args, cache_format=K8V8)
        assert same_bits(ops.paged_attention(**args, cache_format=K8V8, arrivals=arrivals), want)
    with pytest.raises(RuntimeError, match="kv_cache holds 132 bytes per slot, but k8v8 of query's head_size 32 takes"):
        ops.prepare_paged_attention(args["query"][..., :32].contiguous(), args["kv_cache"], cache_format=K8V8)


def test_slot_mapping_may_be_shorter_than_key(device):
    """vLLM pads K and V for CUDA graphs and leaves the mapping as it is."""
    args = write_args(device)
    ops.reshape_and_cache(**args, cache_format=K8V8)
    padded = {name: torch.cat([args[name], torch.full_like(args[name], torch.nan)]) for name in ("key", "value")}
    kv_cache = torch.zeros_like(args["kv_cache"])
    ops.reshape_and_cache(**padded, kv_cache=kv_cache, slot_mapping=args["slot_mapping"], cache_format=K8V8)
    assert torch.equal(kv_cache, args["kv_cache"])


def test_nothing_to_do(device):
    write, read = write_args(device), read_args(device)
    for x in ("key", "value", "slot_mapping"):
        write[x] = write[x][:0]
    ops.reshape_and_cache(**write, cache_format=K8V8)
    assert not write["kv_cache"].any()

    no_tokens = {**read, "query": read["query"][:0], "query_start_loc": torch.zeros_like(read["query_start_loc"])}
    out, lse = ops.paged_attention(**no_tokens, return_lse=True, cache_format=K8V8)
    assert out.shape == (0, 4, 64) and lse.shape == (4, 0)

    no_seqs = {name: read[name][:n] for name, n in (("block_table", 0), ("seq_lens", 0), ("query_start_loc", 1))}
    out = torch.full_like(read["query"], 7.0)
    _, lse = ops.paged_attention(**{**read, **no_seqs}, out=out, return_lse=True, cache_format=K8V8)
    assert (out == 7.0).all() and lse.isneginf().all()

    empty = {**read, "kv_cache": read["kv_cache"][:0], "seq_lens": torch.zeros_like(read["seq_lens"])}
    out, lse = ops.paged_attention(**empty, causal=False, return_lse=True, cache_format=K8V8)
    assert not out.any() and lse.isneginf().all()


def misaligned(x: torch.Tensor, offset: int) -> torch.Tensor:
    """A copy whose storage starts `offset` bytes off."""
    raw = torch.zeros(x.numel() * x.itemsize + 16, dtype=torch.uint8, device=x.device)
    view = raw[offset : offset + x.numel() * x.itemsize].view(torch.int8).view(x.shape)
    assert view.data_ptr() % 2 == offset % 2
    return view.copy_(x)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_cache_at_an_odd_address(kernel, offset):
    write, read = write_args(kernel), read_args(kernel)
    kv_cache = misaligned(write["kv_cache"], offset)
    if kernel == "cuda":
        with pytest.raises(RuntimeError, match="kv_cache must start at a multiple of 16 bytes"):
            ops.reshape_and_cache(**{**write, "kv_cache": kv_cache}, cache_format=K8V8)
        with pytest.raises(RuntimeError, match="kv_cache must start at a multiple of 16 bytes"):
            ops.paged_attention(**{**read, "kv_cache": kv_cache}, cache_format=K8V8)
        return
    ops.reshape_and_cache(**write, cache_format=K8V8)
    ops.reshape_and_cache(**{**write, "kv_cache": kv_cache}, cache_format=K8V8)
    assert torch.equal(kv_cache, write["kv_cache"])
    want = ops.paged_attention(**read, cache_format=K8V8)
    assert same_bits(
        ops.paged_attention(**{**read, "kv_cache": misaligned(read["kv_cache"], offset)}, cache_format=K8V8), want
    )


small_ints = st.sampled_from([-(2**31), -1, 0, 0, 1, 1, 2, 3, 4, 16, 17, 32, 33, 2**31 - 1])
wild = settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@wild
@given(
    block_table=st.lists(st.sampled_from([-1, 0, 1, 2, 2, 3, 2**31 - 1]), min_size=4, max_size=4),
    seq_lens=st.lists(small_ints, min_size=2, max_size=2),
    query_start_loc=st.lists(st.sampled_from([-1, 0, 0, 1, 2, 4, 4, 5]), min_size=3, max_size=3),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 15, 2**31 - 1]),
)
def test_any_integers_are_attended_or_refused(block_table, seq_lens, query_start_loc, causal, window):
    args = read_args()
    for name, values in (("seq_lens", seq_lens), ("query_start_loc", query_start_loc)):
        args[name] = torch.tensor(values, dtype=torch.int32)
    args["block_table"] = torch.tensor(block_table, dtype=torch.int32).reshape(2, 2)
    begins, ends = query_start_loc[:2], query_start_loc[1:]
    valid = query_start_loc[0] == 0
    for seq, (begin, end, seq_len) in enumerate(zip(begins, ends, seq_lens, strict=True)):
        used = block_table[2 * seq : 2 * seq + 2][: -(-seq_len // 16)] if begin < end else []
        valid &= begin <= end <= 4 and 0 <= seq_len <= 32 and all(0 <= block < 3 for block in used)
        valid &= not causal or end - begin <= seq_len
    if valid:
        out = ops.paged_attention(**args, causal=causal, sliding_window=window, cache_format=K8V8)
        assert out[: query_start_loc[2]].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r"block_table|seq_lens|query_start_loc"):
            ops.paged_attention(**args, causal=causal, sliding_window=window, cache_format=K8V8)


@settings(wild, max_examples=120)
@given(
    lens=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), min_size=1, max_size=4),
    num_kv_heads=st.integers(1, 3),
    num_queries_per_kv=st.integers(1, 9),
    head_size=st.sampled_from([32, 48, 64, 112, 128]),
    block_size=st.sampled_from([16, 48, 64, 144]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    window=st.one_of(st.none(), st.integers(1, 300)),
    softcap=st.sampled_from([0.0, 2.0]),
    causal=st.booleans(),
)
def test_any_batch_equals_the_reference(
    lens, num_kv_heads, num_queries_per_kv, head_size, block_size, dtype, window, softcap, causal
):
    lens = [(query_len, query_len * causal + seq_len) for query_len, seq_len in lens]
    sizes = {"num_heads": num_kv_heads * num_queries_per_kv, "num_kv_heads": num_kv_heads, "head_size": head_size}
    batch = make_batch(lens, **sizes, block_size=block_size, dtype=dtype)
    options = {"sliding_window": window, "softcap": softcap, "causal": causal, "softmax_scale": head_size**-0.5}
    assert_attention_close(
        ops.paged_attention(*batch.args, **options, return_lse=True, cache_format=K8V8), batch, **options
    )

"""What only a GPU has: streams, CUDA graphs, caches beyond 2^31 bytes."""

import pytest
import torch
from hostile import make_batch, same_bits

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.formats import K8V8

OPTIONS = {"softmax_scale": 0.125, "cache_format": K8V8}
LENS = [(1, 700), (1, 333), (1, 40)]


def test_operators_run_on_the_current_stream(cuda):
    """The stream sleeps first: on any other, the operators would read what is not there yet."""
    key, value = torch.randn(2, 64, 2, 64, device=cuda)
    slots = torch.arange(64, device=cuda)
    expected = K8V8.allocate(4, 2, 16, 64, cuda)
    ops.reshape_and_cache(key, value, expected, slots, cache_format=K8V8)
    late_key, late_value = torch.zeros_like(key), torch.zeros_like(value)
    cache = K8V8.allocate(4, 2, 16, 64, cuda)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late_key.copy_(key)
        late_value.copy_(value)
        ops.reshape_and_cache(late_key, late_value, cache, slots, cache_format=K8V8)
    stream.synchronize()
    assert same_bits(cache, expected)


@pytest.mark.parametrize("keeps_arrivals", [True, False])
@pytest.mark.parametrize("query_len", [1, 4])
def test_a_graph_replays_with_other_lengths_and_blocks(query_len, keeps_arrivals, cuda):
    """As vLLM replays a decode graph: the same buffers with other contents, padding sequences of no tokens included."""
    batch = make_batch([(query_len, seq_len) for _, seq_len in LENS], dtype=torch.bfloat16, device=cuda)
    query, _, block_table, seq_lens, starts = (tensor.clone() for tensor in batch.args)
    cache = batch.kv_cache
    out = torch.empty_like(query)
    arrivals = ops.prepare_paged_attention(query, cache, cache_format=K8V8) if keeps_arrivals else None

    def attend() -> None:
        ops.paged_attention(query, cache, block_table, seq_lens, starts, out=out, arrivals=arrivals, **OPTIONS)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend()

    def check(rows: int) -> None:
        out.fill_(torch.nan)
        graph.replay()
        want = ops.paged_attention(query, cache, block_table, seq_lens, starts, **OPTIONS)
        assert same_bits(out[:rows], want[:rows])
        assert not out[:rows].isnan().any()
        assert arrivals is None or (len(arrivals) and not arrivals.any())

    check(3 * query_len)
    query[: 3 * query_len] = torch.randn_like(query[: 3 * query_len])
    seq_lens.copy_(torch.tensor([query_len, 200, 40], device=cuda))
    block_table[0], block_table[1] = block_table[1].clone(), block_table[0].clone()
    check(3 * query_len)
    seq_lens[2], starts[3] = 0, starts[2]
    check(2 * query_len)


def test_arrivals_of_another_size_are_refused(cuda):
    batch = make_batch([(1, 700)], dtype=torch.bfloat16, device=cuda)
    for arrivals in (torch.zeros(1, dtype=torch.int32, device=cuda), torch.zeros(9999, device=cuda)):
        with pytest.raises(RuntimeError, match=r"paged_attention|arrivals"):
            ops.paged_attention(*batch.args, arrivals=arrivals, **OPTIONS)


def test_a_graph_writes_other_slots(cuda):
    key, value = torch.randn(2, 8, 2, 64, device=cuda)
    slots = torch.arange(8, device=cuda)
    cache = K8V8.allocate(4, 2, 16, 64, cuda)
    ops.reshape_and_cache(key, value, cache, slots, cache_format=K8V8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.reshape_and_cache(key, value, cache, slots, cache_format=K8V8)
    key.normal_()
    slots.copy_(torch.tensor([60, 1, -1, 33, 17, -1, 5, 6], device=cuda))
    cache.zero_()
    graph.replay()
    want = torch.zeros_like(cache)
    ops.reshape_and_cache(key, value, want, slots, cache_format=K8V8)
    assert same_bits(cache, want)


def test_blocks_beyond_two_gigabytes(cuda):
    """A layer's cache of 2.2 GB; the sequence lies at its end."""
    num_blocks = 2**31 // (8 * 16 * K8V8.content_bytes(128)) + 64
    if torch.cuda.mem_get_info()[0] < 3 << 30:
        pytest.skip("needs 3 GB of free GPU memory")
    cache = K8V8.allocate(num_blocks, 8, 16, 128, cuda)
    assert cache.numel() > 2**31
    small = K8V8.allocate(4, 8, 16, 128, cuda)
    key, value = torch.randn(2, 64, 8, 128, device=cuda, dtype=torch.bfloat16)
    query = torch.randn(1, 32, 128, device=cuda, dtype=torch.bfloat16)
    seq_lens, starts = (torch.tensor(values, dtype=torch.int32, device=cuda) for values in ([64], [0, 1]))
    results = []
    for kv_cache, first in ((small, 0), (cache, num_blocks - 4)):
        ops.reshape_and_cache(key, value, kv_cache, torch.arange(64, device=cuda) + 16 * first, cache_format=K8V8)
        table = torch.arange(first, first + 4, dtype=torch.int32, device=cuda)[None]
        results.append(ops.paged_attention(query, kv_cache, table, seq_lens, starts, **OPTIONS))
    assert same_bits(cache[-4:], small)
    assert same_bits(*results)

"""What CUDA graphs and the memory profile need of the backend, as far as a CPU can show it."""

from types import SimpleNamespace

import torch

from vllm_int8kv import backend, ops


def test_metadata_are_the_buffers_of_vllm():
    """A graph reads them anew at every replay: a copy would keep the batch it was captured with."""
    buffers = {
        "block_table_tensor": torch.zeros(4, 8, dtype=torch.int32),
        "seq_lens": torch.ones(4, dtype=torch.int32),
        "query_start_loc": torch.arange(5, dtype=torch.int32),
    }
    common = SimpleNamespace(causal=True, num_actual_tokens=4, **buffers)
    metadata = backend.Int8KVMetadataBuilder.build(None, 0, common)
    assert metadata.block_table is buffers["block_table_tensor"]
    assert metadata.seq_lens is buffers["seq_lens"]
    assert metadata.query_start_loc is buffers["query_start_loc"]


def test_profiling_takes_the_workspace_of_the_largest_batch(monkeypatch):
    """The operator allocates by the number of sequences, and takes a batch of no tokens."""
    batches, paged_attention = [], ops.paged_attention

    def attend(*args, **options):
        batches.append(args)
        return paged_attention(*args, **options)

    monkeypatch.setattr(ops, "paged_attention", attend)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=256))
    layer = SimpleNamespace(vllm_config=config, num_kv_heads=2, head_size=64, scale=0.125)
    backend.Int8KVImpl.take_workspace(layer, torch.randn(8, 4, 64))
    ((query, _, block_table, seq_lens, query_start_loc),) = batches
    assert query.shape == (0, 4, 64)
    assert (block_table.shape, seq_lens.shape, query_start_loc.shape) == ((256, 1), (256,), (257,))

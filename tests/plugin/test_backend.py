"""What CUDA graphs and the memory profile need of the backend, as far as a CPU can show it."""

from types import SimpleNamespace

import pytest
import torch

from vllm_int8kv.serving import attention, metadata, prefill


def test_metadata_are_the_buffers_of_vllm():
    """A graph reads them anew at every replay: a copy would keep the batch it was captured with."""
    buffers = {
        "block_table_tensor": torch.zeros(4, 8, dtype=torch.int32),
        "seq_lens": torch.ones(4, dtype=torch.int32),
        "query_start_loc": torch.arange(5, dtype=torch.int32),
    }
    common = SimpleNamespace(causal=True, num_actual_tokens=4, **buffers)
    arrivals = torch.zeros(12, dtype=torch.int32)
    builder = SimpleNamespace(plans_prefill=False, arrivals=arrivals)
    built = metadata.Int8KVMetadataBuilder.build(builder, 0, common)
    assert built.arrivals is arrivals
    assert built.block_table is buffers["block_table_tensor"]
    assert built.seq_lens is buffers["seq_lens"]
    assert built.query_start_loc is buffers["query_start_loc"]


def config(max_num_batched_tokens: int = 512, max_model_len: int = 40960) -> SimpleNamespace:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )


@pytest.mark.parametrize(
    "max_model_len, window, rows",
    [(1024, None, 512 + 1024), (131072, None, 512 + 32768), (131072, 65536, 512 + 65536), (131072, 4096, 512 + 32768)],
)
def test_the_prefill_workspace_holds_a_step_and_its_windows(max_model_len, window, rows):
    assert metadata.max_prefill_rows(config(max_model_len=max_model_len), window) == rows


def test_profiling_reserves_the_prefill_workspace():
    """vLLM profiles with a step that has no metadata."""
    sizes = []
    layer = SimpleNamespace(
        vllm_config=config(),
        sliding_window=None,
        prefill_attention=print,
        prefill_workspace=lambda num_rows, query: sizes.append(num_rows),
    )
    tensors = torch.ones(4, 8, 4, 64)
    output = attention.Int8KVImpl.forward(layer, None, *tensors[:3], None, None, tensors[3])
    assert sizes == [512 + prefill.MAX_CONTEXT_ROWS] and not output.any()


@pytest.mark.parametrize(
    "query_lens, num_decodes",
    [
        ([1, 1, 1], None),
        ([1, 16, 17, 40], 2),
        ([17], 0),
        ([1, 30, 0, 0], 1),  # a padded batch
        ([30, 1], None),  # a decode after a prompt: all by our own kernel
        ([0, 0], None),
    ],
)
def test_what_is_a_prompt(query_lens, num_decodes):
    sizes = {"sliding_window": None, "reorder_batch_threshold": prefill.MAX_DECODE_QUERY_LEN}
    builder = SimpleNamespace(vllm_config=config(), device=torch.device("cpu"), **sizes)
    batch = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, *query_lens]).cumsum(0),
        seq_lens_cpu_upper_bound=torch.tensor(query_lens) + 5,
    )
    plan = metadata.Int8KVMetadataBuilder.plan_prefill(builder, batch)
    assert (None if plan is None else plan.num_decodes) == num_decodes
    if plan is not None:
        assert plan.num_decode_tokens == sum(query_lens[:num_decodes])
        assert plan.groups[-1].tokens.stop == sum(query_lens)


def test_nothing_waits_for_the_device():
    """Where the lengths are on the device alone, they stay there: prompts are then attended by our own kernel."""
    batch = SimpleNamespace(query_start_loc_cpu=torch.tensor([0, 40]), seq_lens_cpu_upper_bound=None)
    builder = SimpleNamespace(reorder_batch_threshold=prefill.MAX_DECODE_QUERY_LEN)
    assert metadata.Int8KVMetadataBuilder.plan_prefill(builder, batch) is None


@pytest.mark.parametrize("for_cudagraph_capture", [False, True])
def test_metadata_of_model_runner_v2(for_cudagraph_capture):
    """What vLLM's second runner, the default on GPUs, makes of a batch that is padded to a graph: its buffers are
    longer than the batch, and sequences of no tokens end it."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    builder = object.__new__(metadata.Int8KVMetadataBuilder)
    builder.plans_prefill, builder.sliding_window, builder.arrivals = True, None, None
    builder.vllm_config, builder.device = config(), torch.device("cpu")
    builder.reorder_batch_threshold = prefill.MAX_DECODE_QUERY_LEN
    group = SimpleNamespace(
        get_metadata_builder=lambda ubatch_idx: builder,
        kv_cache_spec=None,
        layer_names=["layers.0"],
        build_metadata=lambda common, ubatch_idx: builder.build(0, common),
        build_metadata_for_cudagraph_capture=lambda common, ubatch_idx: builder.build_for_cudagraph_capture(common),
    )
    query_lens = [1, 4, 40, 0]
    bounds = torch.tensor([0, *query_lens]).cumsum(0).int()
    seq_lens = torch.tensor([70, 9, 100, 0, 0, 0], dtype=torch.int32)  # of a buffer for six sequences
    block_table = torch.arange(6 * 8, dtype=torch.int32).view(6, 8)
    built = build_attn_metadata(
        [[group]],
        num_reqs=4,
        num_tokens=48,
        query_start_loc_gpu=bounds,
        query_start_loc_cpu=bounds.clone(),
        max_query_len=40,
        seq_lens=seq_lens,
        max_seq_len=100,
        block_tables=[block_table],
        slot_mappings=torch.zeros(1, 48, dtype=torch.int64),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[None]),
        # A draft that may not be accepted makes the second sequence longer than it is.
        seq_lens_cpu_upper_bound=torch.tensor([70, 12, 100, 0], dtype=torch.int32),
        for_cudagraph_capture=for_cudagraph_capture,
    )["layers.0"]
    assert built.seq_lens.data_ptr() == seq_lens.data_ptr() and len(built.seq_lens) == 4
    assert built.block_table is block_table and built.query_start_loc is bounds and built.num_actual_tokens == 48
    plan = built.prefill_plan
    assert (plan.num_decodes, plan.num_decode_tokens, plan.groups[-1].tokens.stop) == (2, 5, 45)


def test_blocks_of_a_gpu_begin_on_whole_lines(monkeypatch):
    from vllm_int8kv.serving import backend

    assert backend.Int8KVBackend.get_preferred_block_size(16) == 16
    monkeypatch.setattr(backend, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    assert [backend.Int8KVBackend.get_preferred_block_size(size) for size in (16, 128)] == [64, 128]

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
    built = metadata.Int8KVMetadataBuilder.build(SimpleNamespace(plans_prefill=False), 0, common)
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
        seq_lens=torch.tensor(query_lens) + 5,
        seq_lens_cpu_upper_bound=None,
    )
    plan = metadata.Int8KVMetadataBuilder.plan_prefill(builder, batch)
    assert (None if plan is None else plan.num_decodes) == num_decodes
    if plan is not None:
        assert plan.num_decode_tokens == sum(query_lens[:num_decodes])
        assert plan.groups[-1].tokens.stop == sum(query_lens)

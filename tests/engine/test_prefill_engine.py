"""The way prompts take on a GPU, in a real engine: with plain attention in place of FlashAttention it runs anywhere."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from engines import engine, kl_per_token, prompt_logprobs
from plain_attention import plain_attention

from vllm_int8kv.cache import ops
from vllm_int8kv.serving import prefill, varlen_attention

MAX_KL = 1e-5
"""Between the two ways, nats per token: at most 2e-7 was seen. Other roundings of a layer flip codes of the next."""

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "model, is_split",
    [
        (tiny_models.llama, True),
        (tiny_models.gemma2, True),  # softcap, sliding and full layers
        (tiny_models.gpt_oss, True),  # sinks
        (tiny_models.mistral, False),
        (tiny_models.bloom, False),  # ALiBi: prompts longer than the workspace go to our own kernel
    ],
    ids=["llama", "gemma2", "gpt_oss", "mistral", "bloom"],
)
def test_prompts_through_a_library(
    model: Callable[[Path], Path], is_split: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "skip_tokenizer_init": True,
        "max_logprobs": -1,
    }
    folder = model(tmp_path)
    with engine(folder, **options) as llm:
        want = prompt_logprobs(llm)

    calls, own_query_lens = [], []

    def library(call: varlen_attention.VarlenCall) -> torch.Tensor:
        calls.append(call)
        return plain_attention(call)

    def own(query, kv_cache, block_table, seq_lens, query_start_loc, **call):
        own_query_lens.append(int(query_start_loc.diff().max()))
        return paged_attention(query, kv_cache, block_table, seq_lens, query_start_loc, **call)

    paged_attention = ops.paged_attention
    monkeypatch.setattr(ops, "paged_attention", own)
    monkeypatch.setattr(varlen_attention, "find", lambda *args, **needs: library)
    monkeypatch.setattr(prefill, "MAX_CONTEXT_ROWS", 16)
    with engine(folder, **options) as llm:
        own_query_lens.clear()  # of the warm-up
        got = prompt_logprobs(llm)
    assert kl_per_token(want, got) <= MAX_KL
    assert min(call.max_query_len for call in calls) > prefill.MAX_DECODE_QUERY_LEN
    assert any(call.causal for call in calls)
    assert any(not call.causal for call in calls) == is_split
    if is_split:
        assert max(own_query_lens) <= prefill.MAX_DECODE_QUERY_LEN

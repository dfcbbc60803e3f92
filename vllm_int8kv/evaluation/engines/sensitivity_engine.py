"""The engine of `vllm-int8kv eval --sensitivity`, run by `process`; its plan is an `eval_plan.EvalPlan`.

The engine serves with the INT8 cache, so what is measured is what is served: its calibration, formats and options. A
hook on the attention layers computes what exact attention would give, and puts it in the place of the output of every
layer that is to count as unquantized.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from vllm import LLM
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_int8kv.cache import reference
from vllm_int8kv.evaluation.engines.attention_hooks import KV, AttentionHooks, exact_attention
from vllm_int8kv.evaluation.engines.eval_engine import start, text_files, write_texts
from vllm_int8kv.evaluation.engines.forced_decoding import score_prefill
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.eval_plan import EvalPlan
from vllm_int8kv.evaluation.scoring import KL, load_scores
from vllm_int8kv.evaluation.sensitivity import CacheShape


class ExactLayers(AttentionHooks):
    """Lets single layers attend exactly instead of through their cache."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self.quantized: frozenset[int] = frozenset()
        self.is_measuring = False
        self.errors: dict[int, list[float]] = {index: [] for index in self.layers}

    def is_watching(self, num_tokens: int) -> bool:
        return num_tokens > 1 and get_forward_context().attn_metadata is not None

    def attend(
        self, index: int, layer: Attention, query: torch.Tensor, kv: KV, output: torch.Tensor
    ) -> torch.Tensor | None:
        is_quantized = index in self.quantized
        if is_quantized and not self.is_measuring:
            return None
        exact = exact_attention(layer, query, *kv).reshape(output.shape)
        if self.is_measuring and layer.kv_sharing_target_layer_name is None:
            self.errors[index].append(reference.relative_error(output, exact))
        return None if is_quantized else exact.to(output.dtype)


def main() -> None:
    plan = EvalPlan(**json.load(sys.stdin))
    emit(stage="load", done=0.0)
    plan = replace(plan, paths=("prefill",), generate_tokens=0, needle_lengths=())
    llm = start(plan)
    hooks = ExactLayers(llm)
    emit(stage="load", done=1.0)
    token_ids = plan.token_ids or write_texts(llm, plan)
    model_config = llm.llm_engine.vllm_config.model_config
    vocab_size = model_config.get_vocab_size()
    plan = replace(plan, token_ids=token_ids)

    hooks.is_measuring = True
    score(llm, replace(plan, is_reference=True, label="exact"), vocab_size)
    hooks.is_measuring = False
    emit(stage="errors", done=1.0)
    layers, divergences = [], {}
    for number, index in enumerate([*sorted(hooks.layers), None]):
        hooks.quantized = frozenset(hooks.layers if index is None else [index])
        divergences[index] = score(llm, replace(plan, label=str(index)), vocab_size)
        emit(stage="layers", done=(number + 1) / (len(hooks.layers) + 1))
    native_dtype = model_config.hf_config.dtype or model_config.dtype
    for index, layer in hooks.layers.items():
        cache_format = layer.impl.cache_format
        shape = CacheShape(layer.num_kv_heads, layer.head_size, native_dtype.itemsize, cache_format.name)
        e_o = float(np.mean(hooks.errors[index]))
        layers.append({"layer": index, "e_o": e_o, "kl_per_token": divergences[index], "shape": vars(shape)})
    sharing = [{"layer": index, "reads_cache_of": owner} for index, owner in sorted(hooks.sharing.items())]
    result = {"layers": layers, "sharing_layers": sharing, "kl_all_layers": divergences[None]}
    result |= {"text_tokens": list(map(len, token_ids))}
    finish(llm, result | {"dtype": str(model_config.dtype).removeprefix("torch.")})


def score(llm: LLM, plan: EvalPlan, vocab_size: int) -> float:
    """Mean KL divergence per token of the texts by prefill."""
    # `text_files` keeps the reference under one name for all paths; here it is what the exact prefill gives.
    texts = text_files(plan, plan.token_ids, "decode", vocab_size)
    score_prefill(llm, texts, lambda done: None)
    return _mean(scores[:, KL] for scores in load_scores([text.scores_path for text in texts]))


def _mean(columns: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(columns)).mean())


if __name__ == "__main__":
    main()

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
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from vllm_int8kv.cache import reference
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.engines.eval_engine import start, text_files, write_texts
from vllm_int8kv.evaluation.engines.forced_decoding import score_prefill
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.eval_plan import EvalPlan
from vllm_int8kv.evaluation.scoring import KL, load_scores
from vllm_int8kv.evaluation.sensitivity import CacheShape


class LayerHooks:
    """What runs behind every attention layer of an engine in this process; a prompt must be prefilled in one step."""

    def __init__(self, llm: LLM) -> None:
        found = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
        ours = {
            name: layer
            for name, layer in found.items()
            if layer.attn_type == AttentionType.DECODER and layer.kv_cache_dtype == KV_CACHE_DTYPE
        }
        self.layers = {
            extract_layer_index(name): layer
            for name, layer in ours.items()
            if layer.kv_sharing_target_layer_name is None
        }
        self.sharing = {
            extract_layer_index(name): extract_layer_index(layer.kv_sharing_target_layer_name)
            for name, layer in ours.items()
            if layer.kv_sharing_target_layer_name is not None
        }
        """Layers without a cache of their own, and whose they read."""
        self.quantized: frozenset[int] = frozenset()
        self.is_measuring = False
        self.errors: dict[int, list[float]] = {index: [] for index in self.layers}
        self._kv: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of the prompt in hand, by the name of the layer that owns the cache."""
        for name, layer in ours.items():
            # A layer that reads another one's cache is quantized where that one is.
            index = extract_layer_index(layer.kv_sharing_target_layer_name or name)
            layer.register_forward_hook(lambda layer, args, out, index=index: self._after(index, layer, args, out))

    def _after(self, index: int, layer: Attention, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        num_tokens = args[0].shape[0]
        if num_tokens == 1 or get_forward_context().attn_metadata is None:
            return None
        query = args[0].view(num_tokens, layer.num_heads, layer.head_size)
        owner = layer.kv_sharing_target_layer_name
        if owner is None:
            key, value = (x.view(num_tokens, layer.num_kv_heads, layer.head_size) for x in args[1:3])
            self._kv[layer.layer_name] = key, value
        is_quantized = index in self.quantized
        if is_quantized and not self.is_measuring:
            return None
        exact = exact_attention(layer, query, *self._kv[owner or layer.layer_name]).reshape(output.shape)
        if self.is_measuring and owner is None:
            self.errors[index].append(reference.relative_error(output, exact))
        return None if is_quantized else exact.to(output.dtype)


def exact_attention(layer: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of a whole prompt without a cache, in fp32: `[num_tokens, num_heads, head_size]`.

    One KV head at a time, which bounds the memory of the scores, `[num_queries_per_kv, num_tokens, num_tokens]`.
    """
    impl = layer.impl
    positions = torch.arange(len(query), device=query.device)
    mask = reference.visible_keys(positions, len(query), causal=True, sliding_window=impl.sliding_window)
    num_queries_per_kv = query.shape[1] // key.shape[1]
    out = []
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * num_queries_per_kv, (kv_head + 1) * num_queries_per_kv)
        part, _ = reference.attention(
            query[:, heads].float(),
            key[:, kv_head, None].float(),
            value[:, kv_head, None].float(),
            mask,
            softmax_scale=impl.scale,
            softcap=impl.logits_soft_cap,
            alibi_slopes=None if impl.alibi_slopes is None else impl.alibi_slopes[heads],
            sinks=None if impl.sinks is None else impl.sinks[heads],
        )
        out.append(part)
    return torch.cat(out, dim=1)


def main() -> None:
    plan = EvalPlan(**json.load(sys.stdin))
    emit(stage="load", done=0.0)
    plan = replace(plan, paths=("prefill",), generate_tokens=0, needle_lengths=())
    llm = start(plan)
    hooks = LayerHooks(llm)
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

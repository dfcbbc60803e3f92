"""The engine of `vllm-int8kv eval --sensitivity`, run by `engine_process`; its plan is an `evaluate.Plan`.

The engine's own cache is unquantized. A hook on the attention layers computes what the INT8 cache would give, with
the real operators on a cache that lasts for one call, and puts it in the place of a chosen layer's output.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from vllm_int8kv.cache import formats, ops
from vllm_int8kv.cache.key_transform import key_equalizer
from vllm_int8kv.config import Int8KVConfig
from vllm_int8kv.evaluation.engines.eval_engine import start, text_files, write_texts
from vllm_int8kv.evaluation.engines.forced_decoding import score_prefill
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.evaluate import Plan
from vllm_int8kv.evaluation.scoring import KL, load_scores
from vllm_int8kv.evaluation.sensitivity import CacheShape

RANDOM_TOKENS = 2048


class LayerHooks:
    """What runs behind every attention layer of an engine in this process; a prompt must be prefilled in one step."""

    def __init__(self, llm: LLM, options: Int8KVConfig) -> None:
        found = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
        self.layers = {
            extract_layer_index(name): layer
            for name, layer in found.items()
            if layer.attn_type == AttentionType.DECODER and layer.kv_sharing_target_layer_name is None
        }
        self.options = options
        self.equalizers: dict[int, torch.Tensor | None] = dict.fromkeys(self.layers)
        self.quantized: frozenset[int] = frozenset()
        self.is_calibrating = self.is_measuring = False
        self.errors: dict[int, list[float]] = {index: [] for index in self.layers}
        for index, layer in self.layers.items():
            layer.register_forward_hook(lambda layer, args, out, index=index: self._after(index, layer, args, out))

    def _after(self, index: int, layer: Attention, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        num_tokens = args[0].shape[0]
        if num_tokens == 1 or get_forward_context().attn_metadata is None:
            return None
        shapes = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        query, key, value = (x.view(num_tokens, n, layer.head_size) for x, n in zip(args, shapes, strict=True))
        if self.is_calibrating and self.options.equalize_keys:
            self.equalizers[index] = key_equalizer(query, key)
        if not (self.is_measuring or index in self.quantized):
            return None
        int8 = self._attend(index, layer, query, key, value).view_as(output)
        if self.is_measuring:
            self.errors[index].append(((int8 - output).norm() / output.norm()).item())
        return int8 if index in self.quantized else None

    def _attend(self, index: int, layer: Attention, query, key, value) -> torch.Tensor:
        num_tokens, device = len(query), query.device
        num_blocks = -(-num_tokens // formats.SLOT_GROUP)
        kv_cache = formats.allocate(num_blocks, layer.num_kv_heads, formats.SLOT_GROUP, layer.head_size, device)
        keys = {"rotate_keys": self.options.rotate_keys, "key_equalizer": self.equalizers[index]}
        ops.reshape_and_cache(key, value, kv_cache, torch.arange(num_tokens, device=device), **keys)
        sinks = getattr(layer.impl, "sinks", None)
        slopes = layer.impl.alibi_slopes
        return ops.paged_attention(
            query.contiguous(),
            kv_cache,
            torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            torch.tensor([num_tokens], dtype=torch.int32, device=device),
            torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            softmax_scale=layer.impl.scale,
            sliding_window=layer.sliding_window,
            softcap=getattr(layer.impl, "logits_soft_cap", None) or 0.0,
            alibi_slopes=None if slopes is None else torch.as_tensor(slopes, dtype=torch.float32, device=device),
            sinks=None if sinks is None else sinks.detach().float(),
            **keys,
        )


def main() -> None:
    plan = Plan(**json.load(sys.stdin))
    emit(stage="load", done=0.0)
    options = Int8KVConfig.from_mapping(plan.int8_kv)
    # The engine's cache is its own; the options are for the hooks.
    llm = start(replace(plan, int8_kv={}, paths=("prefill",), generate_tokens=0, needle_lengths=()))
    hooks = LayerHooks(llm, options)
    emit(stage="load", done=1.0)
    token_ids = plan.token_ids or write_texts(llm, plan)
    model_config = llm.llm_engine.vllm_config.model_config
    plan = replace(plan, token_ids=token_ids)

    hooks.is_calibrating = True
    vocab_size = model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    num_random = min(RANDOM_TOKENS, model_config.max_model_len - 1)
    random_ids = torch.randint(vocab_size, (num_random,), generator=generator).tolist()
    llm.generate({"prompt_token_ids": random_ids}, SamplingParams(max_tokens=1), use_tqdm=False)
    hooks.is_calibrating = False

    hooks.is_measuring = True
    score(llm, replace(plan, is_reference=True, label="exact"), vocab_size)
    hooks.is_measuring = False
    emit(stage="errors", done=1.0)
    layers, divergences = [], {}
    for number, index in enumerate([*sorted(hooks.layers), None]):
        hooks.quantized = frozenset(hooks.layers if index is None else [index])
        divergences[index] = score(llm, replace(plan, label=str(index)), vocab_size)
        emit(stage="layers", done=(number + 1) / (len(hooks.layers) + 1))
    itemsize = model_config.hf_config.dtype.itemsize if model_config.hf_config.dtype else model_config.dtype.itemsize
    for index, layer in hooks.layers.items():
        shape = CacheShape(layer.num_kv_heads, layer.head_size, itemsize)
        e_o = float(np.mean(hooks.errors[index]))
        layers.append({"layer": index, "e_o": e_o, "kl_per_token": divergences[index], "shape": vars(shape)})
    result = {"layers": layers, "kl_all_layers": divergences[None], "text_tokens": list(map(len, token_ids))}
    finish(llm, result | {"dtype": str(model_config.dtype).removeprefix("torch.")})


def score(llm: LLM, plan: Plan, vocab_size: int) -> float:
    """Mean KL divergence per token of the texts by prefill."""
    # `text_files` keeps the reference under one name for all paths; here it is what the exact prefill gives.
    texts = text_files(plan, plan.token_ids, "decode", vocab_size)
    score_prefill(llm, texts, lambda done: None)
    return _mean(scores[:, KL] for scores in load_scores([text.scores_path for text in texts]))


def _mean(columns: Iterable[np.ndarray]) -> float:
    return float(np.concatenate(list(columns)).mean())


if __name__ == "__main__":
    main()

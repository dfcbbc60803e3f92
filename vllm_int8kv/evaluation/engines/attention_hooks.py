"""What an engine of this process does behind its attention layers, to measure what their caches cost."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from vllm import LLM
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from vllm_int8kv.cache import reference
from vllm_int8kv.config import KV_CACHE_DTYPE

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a prompt, each `[num_tokens, num_kv_heads, head_size]`."""


class AttentionHooks(ABC):
    """What runs behind every attention layer with this cache; a prompt must be prefilled in one step."""

    def __init__(self, llm: LLM) -> None:
        found = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
        decoders = {name: layer for name, layer in found.items() if layer.attn_type == AttentionType.DECODER}
        ours = {name: layer for name, layer in decoders.items() if layer.kv_cache_dtype == KV_CACHE_DTYPE}
        self.unquantized = sorted(decoders.keys() - ours.keys())
        """Names of layers that have another cache, and no hook."""
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
        self._kv: dict[str, KV] = {}
        """Of the prompt in hand, by the name of the layer that owns the cache."""
        for name, layer in ours.items():
            # A layer that reads another one's cache is quantized where that one is.
            index = extract_layer_index(layer.kv_sharing_target_layer_name or name)
            layer.register_forward_hook(lambda layer, args, out, index=index: self._after(index, layer, args, out))

    def is_watching(self, num_tokens: int) -> bool:
        """Whether the step that runs, of so many tokens, is one to look at; by default every one."""
        return True

    @abstractmethod
    def attend(
        self, index: int, layer: Attention, query: torch.Tensor, kv: KV, output: torch.Tensor
    ) -> torch.Tensor | None:
        """What takes the place of a layer's output; None leaves it.

        Args:
            index: of the layer that owns the cache.
            query: [num_tokens, num_heads, head_size].
            kv: what `store` returned for the owner.
            output: of the layer itself.
        """

    def store(self, index: int, layer: Attention, key: torch.Tensor, value: torch.Tensor) -> KV:
        """What a layer's cache would give back of K and V; by default themselves."""
        return key, value

    def _after(self, index: int, layer: Attention, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        num_tokens = args[0].shape[0]
        if not self.is_watching(num_tokens):
            return None
        query = args[0].view(num_tokens, layer.num_heads, layer.head_size)
        owner = layer.kv_sharing_target_layer_name
        if owner is None:
            key, value = (x.view(num_tokens, layer.num_kv_heads, layer.head_size) for x in args[1:3])
            self._kv[layer.layer_name] = self.store(index, layer, key, value)
        return self.attend(index, layer, query, self._kv[owner or layer.layer_name], output)


def exact_attention(layer: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of a whole prompt without a cache, in fp32: `[num_tokens, num_heads, head_size]`."""
    impl = layer.impl
    query, key, value = query.float(), key.float(), value.float()
    if _is_plain(impl):
        heads_first = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = scaled_dot_product_attention(*heads_first, is_causal=True, scale=impl.scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    # One KV head at a time, which bounds the memory of the scores, [num_queries_per_kv, num_tokens, num_tokens].
    mask = visible_keys(layer, query)
    num_queries_per_kv = query.shape[1] // key.shape[1]
    out = []
    for kv_head in range(key.shape[1]):
        heads = slice(kv_head * num_queries_per_kv, (kv_head + 1) * num_queries_per_kv)
        part, _ = reference.attention(
            query[:, heads], key[:, kv_head, None], value[:, kv_head, None], mask, **score_options(layer, heads)
        )
        out.append(part)
    return torch.cat(out, dim=1)


def visible_keys(layer: Attention, query: torch.Tensor) -> torch.Tensor:
    """Mask `[num_tokens, num_tokens]` of a whole prompt, True where a query may look."""
    positions = torch.arange(len(query), device=query.device)
    return reference.visible_keys(positions, len(query), causal=True, sliding_window=layer.impl.sliding_window)


def score_options(layer: Attention, heads: slice | None = None) -> dict[str, Any]:
    """How a layer makes scores of queries and keys, as arguments of `reference.attention`, for all or some heads."""
    impl, heads = layer.impl, slice(None) if heads is None else heads
    return {
        "softmax_scale": impl.scale,
        "softcap": impl.logits_soft_cap,
        "alibi_slopes": None if impl.alibi_slopes is None else impl.alibi_slopes[heads],
        "sinks": None if impl.sinks is None else impl.sinks[heads],
    }


def _is_plain(impl: object) -> bool:
    """Whether a layer does nothing but causal attention."""
    return not (impl.logits_soft_cap or impl.sliding_window is not None or impl.sinks is not None) and (
        impl.alibi_slopes is None
    )

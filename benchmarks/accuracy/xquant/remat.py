"""A model in plain PyTorch whose attention reads the K and V that a codec rematerializes from its input.

X is what enters the projections of Q, K and V, after the norm. Q comes from X as it is, K and V from what a codec gives
back of it, through the model's own projections and rotary embedding; every token attends to such K and V only, its own
included.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from benchmarks.accuracy.schemes import through_cache
from benchmarks.accuracy.simulator import Simulator, attend
from vllm_int8kv.cache.equalization import calibration_positions, calibration_token_ids
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

Tensors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Coded:
    """What a codec stores of one layer's tokens."""

    codes: torch.Tensor
    """[num_tokens, num_channels] int16"""
    bits: int | None
    """of a code without entropy coding; None where there is no such form"""
    param_bytes: float
    """of scales and midpoints, per token"""


@dataclass
class Run:
    """One text on its way through the layers, which come in order."""

    restore: Callable[[int, torch.Tensor], Tensors]
    """(layer, X) -> keys after the rotary embedding and values, both [num_tokens, num_kv_heads, head_size]."""
    coded: list[Coded] = field(default_factory=list)
    """What the codec stored, in the order of the layers."""


class Codec(ABC):
    """A way to store X, or K and V themselves."""

    @abstractmethod
    def start(self, model: "RematSimulator") -> Run:
        """Begin a text."""


@dataclass(frozen=True)
class Layer:
    """What a codec may know of a layer beforehand."""

    attention: nn.Module
    random_input: torch.Tensor
    """[num_tokens, hidden_size], X of the random tokens that the plugin calibrates with"""

    @cached_property
    def w_k(self) -> torch.Tensor:
        """[num_kv_heads * head_size, hidden_size]"""
        return self.attention.k_proj.weight.detach()

    @cached_property
    def w_v(self) -> torch.Tensor:
        """Same shape as `w_k`."""
        return self.attention.v_proj.weight.detach()


@dataclass(frozen=True)
class Score:
    """A codec on all texts."""

    divergences: list[torch.Tensor]
    """KL(unquantized || codec) of each token of each text, in nats"""
    perplexity_change: float
    """relative"""
    coded: list[list[Coded]]
    """by text and layer"""


class RematSimulator(Simulator):
    """Texts through a Llama-like model, unquantized and by codec."""

    def __init__(self, folder: str, token_ids: Sequence[Sequence[int]]) -> None:
        super().__init__(folder, token_ids)
        self._inputs: dict[int, tuple[torch.Tensor, Tensors]] = {}
        modules = [layer.self_attn for layer in self.model.model.layers]
        for module in modules:
            module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        config = self.model.config
        positions = calibration_positions(config.max_position_embeddings)[None]
        self._run(calibration_token_ids(positions.numel(), config.vocab_size)[None], self._hook, positions)
        self.layers = [Layer(module, self._inputs[index][0]) for index, module in enumerate(modules)]

    def _keep_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._inputs[module.layer_idx] = kwargs["hidden_states"][0], kwargs["position_embeddings"]

    def project(self, layer: int, x: torch.Tensor) -> Tensors:
        """Keys and values of the inputs `[num_tokens, hidden_size]` of a layer."""
        attention = self.layers[layer].attention
        return self.finish(layer, attention.k_proj(x), attention.v_proj(x))

    def finish(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Tensors:
        """Keys and values as attention reads them, of the two projections `[num_tokens, num_kv_heads * head_size]`."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        head_size = self.layers[layer].attention.head_dim
        key, value = (x.view(1, len(x), -1, head_size).transpose(1, 2) for x in (key, value))
        key, _ = apply_rotary_pos_emb(key, key, *self._inputs[layer][1])
        return key[0].transpose(0, 1), value[0].transpose(0, 1)

    def through_k8v8(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Tensors:
        """What a K8V8 cache gives back of keys and values."""
        return through_cache(K8V8, key, value, KeyTransform(equalizer=self.calibrations[layer].equalizer))

    def score(self, codec: Codec, behind_k8v8: bool = False, prefix_tokens: int | None = None) -> Score:
        """Run all texts.

        Args:
            behind_k8v8: what is restored is written to a K8V8 cache and read from there.
            prefix_tokens: how many tokens of a text the codec gives back, to those behind them only: they themselves
                were computed before. The first one behind belongs to the prompt and is not scored.
        """

        def cached(layer: int, key: torch.Tensor, value: torch.Tensor) -> Tensors:
            return self.through_k8v8(layer, key, value) if behind_k8v8 else (key, value)

        divergences, changes, coded = [], [], []
        scored = slice(None) if prefix_tokens is None else slice(prefix_tokens + 1, None)
        for ids, base in zip(self.token_ids, self.reference, strict=True):
            run = codec.start(self)

            def restored(layer, q, k, v, scale, run=run):
                given = run.restore(layer, self._inputs[layer][0])
                if prefix_tokens is None:
                    return attend(q, *cached(layer, *given), scale)
                prefix, behind = slice(prefix_tokens), slice(prefix_tokens, None)
                mixed = [torch.cat([old[prefix], new[behind]]) for old, new in zip(given, (k, v), strict=True)]
                outs = [attend(q, *cached(layer, *pair), scale) for pair in ((k, v), mixed)]
                return torch.cat([outs[0][prefix], outs[1][behind]])

            log_probs = self._run(ids, restored)
            divergences.append((base.exp() * (base - log_probs)).sum(dim=-1)[scored])
            changes.append((base - log_probs)[:-1].gather(1, ids[0, 1:, None]).flatten()[scored])
            coded.append(run.coded)
        return Score(divergences, math.expm1(torch.cat(changes).double().mean().item()), coded)

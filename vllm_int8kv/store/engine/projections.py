"""From the input of an attention layer to the keys and values of its cache, and the hooks that see that input.

A layer's own module computes them: projection, norms, biases and rotary embedding are what they are when it serves. A
replica of it shares its weights, has no hooks, and ends where attention would begin.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear

POSITIONS = ("positions", "position_ids")
INPUTS = ("hidden_states", "x")
EMBEDDINGS = "position_embeddings"
"""What modules of the Transformers backend take in place of positions: cosines and sines."""
PROBE_TOKENS = 16
MIN_TRACE = 1e-30


class _Reached(Exception):
    """Attention would begin here."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


class _Stop(nn.Module):
    """In the place of attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise _Reached(key, value)


@dataclass
class Projection:
    """The module around one attention layer, and in it the one that projects K and V.

    Raises:
        ValueError: there is none that can be run by itself; says why.
    """

    attention: nn.Module
    """vLLM's"""
    parent: nn.Module
    linear_name: str
    rotary: nn.Module | None = None
    """of the model, where it computes cosines and sines for all layers"""
    _replica: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self._replica = _shallow(self.parent)
        linear = _shallow(self.linear)
        linear._forward_pre_hooks = type(linear._forward_pre_hooks)()
        for name, child in self.parent.named_children():
            if child is self.attention:
                self._replica._modules[name] = _Stop()
        self._replica._modules[self.linear_name] = linear
        parameters = inspect.signature(type(self.parent).forward).parameters
        names = [p.name for p in parameters.values() if p.name != "self"]
        self._input = next((name for name in INPUTS if name in names), None)
        self._positions = next((name for name in POSITIONS if name in names), None)
        self._takes_embeddings = EMBEDDINGS in names and self.rotary is not None
        known = {self._input, self._positions, EMBEDDINGS if self._takes_embeddings else None}
        required = [
            p.name
            for p in parameters.values()
            if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "attention_mask")
        ]
        self._passes_mask = "attention_mask" in names
        if self._input is None or (unknown := [name for name in required if name not in known]):
            problem = f"no {' or '.join(INPUTS)}" if self._input is None else ", ".join(unknown)
            raise ValueError(f"its forward asks for {problem}")

    @property
    def linear(self) -> LinearBase:
        """What projects K and V."""
        return getattr(self.parent, self.linear_name)

    @property
    def hidden_size(self) -> int:
        return self.linear.input_size

    def keys_and_values(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer writes to its cache.

        Args:
            x: [num_tokens, hidden_size] in the model dtype, what `linear` was given.
            positions: [num_tokens] int64, of the tokens in their sequence.

        Returns:
            Keys and values, each [num_tokens, num_kv_heads, head_size].
        """
        arguments = {self._input: x}
        if self._positions is not None:
            arguments[self._positions] = positions
        if self._takes_embeddings:
            x = arguments[self._input] = x[None]
            arguments |= {EMBEDDINGS: self.rotary(x, positions[None]), "position_ids": positions[None]}
        if self._passes_mask:
            arguments["attention_mask"] = None
        try:
            self._replica(**arguments)
        except _Reached as reached:
            shape = (-1, self.attention.num_kv_heads, self.attention.head_size)
            return reached.key.reshape(shape), reached.value.reshape(shape)
        raise RuntimeError(f"{type(self.parent).__name__} does not call its attention")

    def metric(self, dtype: torch.dtype) -> torch.Tensor:
        """M, [hidden_size, hidden_size] fp32, with x M x = |W_k x|^2 / |W_k|^2 + |W_v x|^2 / |W_v|^2 of every input x.

        W_k and W_v are those of all ranks, which must ask at the same time. The projection itself tells what they are,
        as its weights may be packed or quantized; its bias does not count.

        Args:
            dtype: of the model.
        """
        linear = self._replica._modules[self.linear_name]
        probes = torch.cat([torch.eye(self.hidden_size), torch.zeros(1, self.hidden_size)]).to(dtype)
        with torch.inference_mode():
            answer = linear(probes)
            rows = (answer[0] if isinstance(answer, tuple) else answer).float()
            v_size = linear.num_kv_heads * linear.v_head_size
            kv_size = linear.num_kv_heads * linear.head_size + v_size
            weights = rows[:-1, -kv_size:] - rows[-1:, -kv_size:]
            key, value = weights[:, :-v_size], weights[:, -v_size:]
            squares = [get_tp_group().all_reduce(own @ own.T) for own in (key, value)]
            return sum(own / own.trace().clamp_min(MIN_TRACE) for own in squares)

    def write(self, x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        """Write keys and values to the layer's cache, as the layer does it itself.

        Args:
            slots: [num_tokens] int64, of the cache.
        """
        key, value = self.keys_and_values(x, positions)
        layer = self.attention
        layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slots)

    def check(self, dtype: torch.dtype) -> None:
        """Try the replica on a few tokens.

        Raises:
            ValueError: it does not give keys and values of the given input, by itself; says why.
        """
        seen: list[torch.Tensor] = []
        x = torch.linspace(-1, 1, PROBE_TOKENS * self.hidden_size).reshape(PROBE_TOKENS, -1).to(dtype)
        linear = self._replica._modules[self.linear_name]
        handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            with torch.inference_mode(), _alone():
                self.keys_and_values(x, torch.arange(PROBE_TOKENS))
        except Exception as error:  # whatever a module raises when it is run outside of its model
            raise ValueError(f"it cannot be run by itself ({type(error).__name__}: {error})") from None
        finally:
            handle.remove()
        if len(seen) != 1 or not torch.equal(seen[0].reshape(x.shape), x):
            raise ValueError(f"its {self.linear_name} is not given what it is given itself")


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, whose children can be replaced."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    for name, value in vars(found).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # the forward that vLLM gave this one module
            setattr(found, name, MethodType(value.__func__, found))
    return found


class _NoOtherRanks:
    """In the place of what talks to the other ranks."""

    def __getattr__(self, name: str) -> None:
        raise RuntimeError("it communicates with the other ranks")


@contextmanager
def _alone() -> Iterator[None]:
    """Fail where a module talks to other ranks: each fills its cache at its own pace."""
    group = get_tp_group()
    kept, group.device_communicator = group.device_communicator, _NoOtherRanks()
    try:
        yield
    finally:
        group.device_communicator = kept


def find_projections(model: nn.Module, attentions: Iterable[nn.Module]) -> list[Projection]:
    """The projections of attention layers of a model.

    Raises:
        ValueError: there is not one module that projects K and V of a layer from one input; names the layer.
    """
    parents = {child: module for module in model.modules() for child in module.children()}
    rotary = next((m for name, m in model.named_modules() if name.endswith("model.rotary_emb")), None)
    return [_projection_of(attention, parents.get(attention), rotary) for attention in attentions]


def _projection_of(attention: nn.Module, parent: nn.Module | None, rotary: nn.Module | None) -> Projection:
    what = f"layer {attention.layer_name}"
    if parent is None:
        raise ValueError(f"{what} is in no module of the model")
    linears = [name for name, child in parent.named_children() if isinstance(child, QKVParallelLinear)]
    try:
        if len(linears) != 1:
            raise ValueError(f"it has {len(linears)} projections of Q, K and V")
        return Projection(attention, parent, linears[0], rotary)
    except ValueError as error:
        raise ValueError(f"{what} ({type(parent).__name__}): {error}") from None

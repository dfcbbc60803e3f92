"""The inputs of attention layers as contents of blocks: seen while they are computed, and projected when they return.

Hooks on the projections of a loaded model call a custom operator, which is opaque to compilers.
"""

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.library import Library
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.engine.contents import Block, Contents, Taken, Written
from vllm_int8kv.store.engine.projections import find_projections
from vllm_int8kv.store.engine.staging import Staging
from vllm_int8kv.store.inputs.layers import InputLayer

COMPILE_KEY = "int8kv_store_inputs"
PROJECTION = "int8kv_projection"
"""Attribute of an attention layer: a table of this module would keep models of engines that are gone."""
_capturing: "weakref.ref[InputContents] | None" = None
"""What keeps the inputs that the model of this process computes."""


def capture_input(x: torch.Tensor, layer_name: str) -> None:
    """Keep the input of a layer's projection, if anybody does."""
    if _capturing is not None and (contents := _capturing()) is not None:
        contents.add(layer_name, x)


def _ignore_input(x: torch.Tensor, layer_name: str) -> None:
    """For compilers, which ask for shapes."""


_library = Library("int8kv_store", "FRAGMENT")
# An operator that returns nothing and changes nothing would be removed by compilers.
direct_register_custom_op(
    "capture_input", capture_input, mutates_args=["x"], fake_impl=_ignore_input, target_lib=_library
)


def follow_model(model: nn.Module, vllm_config: Any) -> None:
    """Put hooks on the projections of a model that has been loaded and not yet compiled.

    Raises:
        ValueError: inputs cannot be stored of this engine; says why.
    """
    if reasons := input_reasons(vllm_config):
        raise ValueError(f"KVStoreConnector cannot store inputs of layers with {'; '.join(reasons)}")
    # vLLM keeps compiled models by a hash that this is part of; one that was compiled without hooks would be found.
    vllm_config.additional_config = {**vllm_config.additional_config, COMPILE_KEY: True}
    layers = vllm_config.compilation_config.static_forward_context.values()
    with_cache = [x for x in layers if isinstance(x, Attention) and x.kv_sharing_target_layer_name is None]
    try:
        found = find_projections(model, (layer for layer in with_cache if not hasattr(layer, PROJECTION)))
    except ValueError as error:
        raise ValueError(f"KVStoreConnector cannot store inputs of {error}") from None
    for projection in found:
        layer = projection.attention
        setattr(layer, PROJECTION, projection)
        projection.linear.register_forward_pre_hook(_make_hook(layer.layer_name))


def _make_hook(layer_name: str) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        torch.ops.int8kv_store.capture_input(args[0], layer_name)

    return hook


def input_reasons(vllm_config: Any) -> Sequence[str]:
    """Why the inputs of an engine's layers cannot be stored, if so."""
    reasons = []
    if not isinstance(vllm_config.additional_config, dict):
        reasons.append(f"additional_config={vllm_config.additional_config!r}: it must be a dict")
    if vllm_config.lora_config is not None:
        reasons.append("enable_lora=True: adapters change what keys and values are made of them")
    speculative_config = vllm_config.speculative_config
    if speculative_config is not None and speculative_config.uses_draft_kv_cache():
        reasons.append(f"a draft model (method={speculative_config.method!r})")
    if not current_platform.is_cpu():
        reasons.append(f"{current_platform.device_name}: inputs of layers are captured on CPUs only")
    if vllm_config.model_config.uses_mrope:
        reasons.append("M-RoPE: positions depend on the images of a prompt")
    return reasons


def input_layers(layer_names: Collection[str], vllm_config: Any) -> list[InputLayer]:
    """The layers of an engine as codecs of inputs see them, in the order of the model."""
    layers = vllm_config.compilation_config.static_forward_context
    dtype, block_size = vllm_config.model_config.dtype, vllm_config.cache_config.block_size
    found = []
    for name in (name for name in layers if name in layer_names):
        projection = getattr(layers[name], PROJECTION)
        try:
            projection.check(dtype)
        except ValueError as error:
            module = type(projection.parent).__name__
            raise ValueError(f"KVStoreConnector cannot store inputs of layer {name} ({module}): {error}") from None
        found.append(InputLayer(name, projection.hidden_size, block_size, dtype))
    return found


def metrics_of(layers: Sequence[InputLayer], vllm_config: Any) -> list[torch.Tensor]:
    """What K and V see of the inputs of layers, as `Projection.metric` says; all ranks must ask at the same time."""
    attention = vllm_config.compilation_config.static_forward_context
    return [getattr(attention[layer.name], PROJECTION).metric(layer.dtype) for layer in layers]


class InputContents(Contents):
    """The inputs of the layers.

    Args:
        codec: of `InputLayer`s, in the order of the model.
        vllm_config: of the engine.
        num_blocks, page_bytes: of the KV cache.
        max_bytes: of inputs that wait for their block to be full.
        saves: whether this rank saves: inputs are the same on all.
    """

    # vLLM's matrix products on CPUs (`onednn_mm`) share a workspace: two at the same time corrupt the heap.
    is_filled_in_step = True

    def __init__(
        self, codec: Codec, vllm_config: Any, *, num_blocks: int, page_bytes: int, max_bytes: int, saves: bool
    ) -> None:
        global _capturing
        super().__init__(codec, page_bytes)
        self.saves = saves
        layers = codec.layers
        attention = vllm_config.compilation_config.static_forward_context
        self._projections = [getattr(attention[layer.name], PROJECTION) for layer in layers]
        self._places = {layer.name: place for place, layer in enumerate(layers)}
        self._block_size = layers[0].block_size
        scheduler_config = vllm_config.scheduler_config
        capacity = -(-scheduler_config.max_num_batched_tokens // self._block_size) + 2 * scheduler_config.max_num_seqs
        capacity = min(capacity, num_blocks, max_bytes // self.block_bytes) if saves else 0
        shape = (len(layers), self._block_size, layers[0].hidden_size)
        self._staging = Staging(*shape, layers[0].dtype, num_blocks=num_blocks, capacity=capacity)
        _capturing = weakref.ref(self) if saves else None

    def begin_step(self, written: Mapping[int, Written], allocated: Collection[int]) -> None:
        self._staging.begin_step(written)

    def add(self, layer_name: str, x: torch.Tensor) -> None:
        """Keep the input `[..., num_tokens, hidden_size]` of a layer in the step that is computed."""
        slot_mapping = get_forward_context().slot_mapping
        # There are no slots while vLLM measures, compiles or calibrates.
        if isinstance(slot_mapping, dict) and (slots := slot_mapping.get(layer_name)) is not None:
            self._staging.add(self._places[layer_name], x.reshape(-1, x.shape[-1]), slots)

    def forget(self, request_ids: set[str]) -> None:
        self._staging.forget(request_ids)

    def take(self, blocks: Sequence[Block]) -> Taken:
        found, inputs = self._staging.take(blocks)
        return Taken(found, inputs.unbind(dim=1))

    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        offsets = torch.arange(self._block_size)
        firsts = torch.tensor([(block.place, block.block_id) for block in blocks]) * self._block_size
        positions, slots = ((first[:, None] + offsets).flatten() for first in firsts.unbind(dim=1))
        with torch.inference_mode():
            for projection, part, layer in zip(self._projections, parts, self.codec.layers, strict=True):
                projection.write(part.reshape(-1, layer.hidden_size).to(layer.dtype), positions, slots)

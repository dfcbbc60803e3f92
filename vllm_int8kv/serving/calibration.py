"""Finds every layer's key equalizer by one forward pass over random tokens when a model has been loaded.

It runs after the last attention layer's weights are processed, before vLLM measures memory, adds LoRA or compiles.
Every layer sets its factors from the Q and K it sees, then attends through a cache of its own that is written with
them (`Int8KVImpl.calibrate`), so that later layers see what they will see when serving. The tokens are always the same,
so engines of one model and machine agree.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_int8kv.cache.equalization import calibration_positions, calibration_token_ids
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.serving.layers import is_ours, registry

logger = init_logger("vllm.int8kv")

FORWARD_ARGUMENTS = {"input_ids", "positions"}
"""What a model may require of its caller to be run here."""


class State(Enum):
    """Of one attention layer."""

    LOADING = "its weights are not there yet"
    LOADED = "its weights are there"
    DONE = "it has its factors, or will do without"


class Calibrated(Protocol):
    """What calibration needs of the implementation of a layer."""

    vllm_config: Any
    calibration_state: State
    key_transform: KeyTransform


@dataclass
class Pass:
    """A forward pass in progress."""

    caches: dict[str, torch.Tensor] = field(default_factory=dict)
    """By layer name, for layers that read the cache of another."""


_running: Pass | None = None


def running() -> Pass | None:
    """The pass in progress in this process, if there is one."""
    return _running


def new_state(equalize_keys: bool) -> State:
    """The state of a layer that is being built."""
    return State.LOADING if equalize_keys else State.DONE


def layer_is_loaded(impl: Calibrated) -> None:
    """Note that the weights of a layer are there; once those of its whole model are, find the factors."""
    if impl.calibration_state is not State.LOADING:  # weights loaded again keep their factors: any are exact
        return
    impl.calibration_state = State.LOADED
    context = impl.vllm_config.compilation_config.static_forward_context
    layer = next(layer for layer in context.values() if getattr(layer, "impl", None) is impl)
    model = registry.root(layer)
    layers = [module for module in model.modules() if is_ours(module)]
    if any(layer.impl.calibration_state is State.LOADING for layer in layers):
        return
    problem = _why_not(model, impl.vllm_config)
    if problem is None:
        try:
            _run(model, impl.vllm_config)
        except Exception as error:  # whatever a model raises when it is run outside of a batch
            problem = f"its pass over random tokens failed ({type(error).__name__}: {error})"
    for layer in layers:
        _keep(layer, layer.impl.key_transform.equalizer if problem is None else None)
    _log(type(model).__name__, layers, problem)


def _keep(layer: nn.Module, equalizer: torch.Tensor | None) -> None:
    """Make the factors of a layer lasting."""
    # A buffer, and no inference tensor, so that vLLM's sleep mode saves it and can write it back in place.
    lasting = None if equalizer is None else equalizer.clone()
    layer.register_buffer("int8kv_key_equalizer", lasting, persistent=False)
    layer.impl.key_transform = replace(layer.impl.key_transform, equalizer=lasting)
    layer.impl.calibration_state = State.DONE


def _why_not(model: nn.Module, vllm_config: Any) -> str | None:
    """Why a model cannot be run here, if so."""
    if vllm_config.kv_transfer_config is not None:
        # The pages of one engine are read by another, which on other hardware may have rounded a factor otherwise.
        return "a KV connector moves the cache between engines, whose factors may differ"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "a stage of a pipeline cannot run by itself"
    parameters = inspect.signature(model.forward).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    if not required >= FORWARD_ARGUMENTS:
        return f"its forward does not take {' and '.join(sorted(FORWARD_ARGUMENTS))}"
    if unknown := sorted(required - FORWARD_ARGUMENTS - {"intermediate_tensors", "inputs_embeds"}):
        return f"its forward asks for {', '.join(unknown)}"
    return None


def _run(model: nn.Module, vllm_config: Any) -> None:
    """Run the model on random tokens; meanwhile `running` tells its layers to set their factors."""
    global _running
    device = vllm_config.device_config.device
    max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens
    positions = calibration_positions(vllm_config.model_config.max_model_len, max_num_tokens).to(device)
    num_tokens = len(positions)
    input_ids = calibration_token_ids(num_tokens, vllm_config.model_config.get_vocab_size()).to(device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, -1)
    options = {"num_tokens": num_tokens, "slot_mapping": {}, "skip_compiled": True}
    _running = Pass()
    try:
        with torch.inference_mode(), set_forward_context(None, vllm_config, **options):
            model(input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
    finally:
        _running = None


def _log(model: str, layers: Sequence[Any], problem: str | None) -> None:
    """Say once per model what was done, layer by layer."""
    if problem is not None:
        logger.warning_once("INT8 KV cache: keys of %s are not equalized: %s", model, problem)
        return
    equalizers = {layer.layer_name: layer.impl.key_transform.equalizer for layer in layers}
    factors = {name: equalizer for name, equalizer in equalizers.items() if equalizer is not None}
    # The common factor of a head means nothing, so outliers show relative to the median.
    largest = {name: (f / f.median(dim=-1, keepdim=True).values).max().item() for name, f in factors.items()}
    logger.info_once(
        "INT8 KV cache: channels of keys equalized in %d layer(s) of %s; largest factor against the median channel: %s",
        len(factors),
        model,
        ", ".join(f"{name.removesuffix('.attn')} {factor:.0f}x" for name, factor in largest.items()),
    )

"""Finds every layer's key equalizer by one forward pass over random tokens, whenever a model's weights are new.

It runs when a model has been loaded, before vLLM measures memory, adds LoRA or compiles, and again after anything that
may have changed the weights of a running engine (see `lifecycle`). Every layer sets its factors from the Q and K it
sees, then attends through a cache of its own that is written with them (`Int8KVImpl.calibrate`), so that later layers
see what they will see when serving. Tokens and positions follow from the model alone, so engines of one model and
machine agree, whatever lengths and batches they are made for.
"""

import functools
import inspect
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger

from vllm_int8kv.cache.equalization import NUM_TOKENS, calibration_positions, calibration_token_ids
from vllm_int8kv.config import Int8KVConfig
from vllm_int8kv.serving.layers import is_ours
from vllm_int8kv.serving.start_up.connectors import is_store

logger = init_logger("vllm.int8kv")

FORWARD_ARGUMENTS = {"input_ids", "positions"}
"""What a model may require of its caller to be run here."""
UNKNOWN_NUM_POSITIONS = 2048
"""Of models whose configuration does not say how many they have; vLLM assumes the same."""


@dataclass
class Pass:
    """A forward pass in progress."""

    caches: dict[str, torch.Tensor] = field(default_factory=dict)
    """By layer name, for layers that read the cache of another."""


_running: Pass | None = None


def running() -> Pass | None:
    """The pass in progress in this process, if there is one."""
    return _running


@dataclass
class Followed:
    """A loaded model whose factors follow its weights."""

    vllm_config: Any
    model_config: Any
    version: int = 0
    """Sum of the version counters of its parameters when the factors were found."""
    was_loaded: bool = False
    """Whether weights have been loaded since."""


_followed: weakref.WeakKeyDictionary[nn.Module, Followed] = weakref.WeakKeyDictionary()


def follow(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Find the factors of a model that has been loaded, and note from here on when its weights change."""
    if model in _followed:
        return
    followed = _followed[model] = Followed(vllm_config, model_config)
    _calibrate(model, followed)
    if (load_weights := getattr(model, "load_weights", None)) is None:
        return

    # Loaders write through `parameter.data`, which no version counter sees. Only a weak reference, or an engine that is
    # gone would keep its weights until Python looks for cycles.
    method, this = load_weights.__func__, weakref.ref(model)

    @functools.wraps(load_weights)
    def noted(*args: Any, **kwargs: Any) -> Any:
        followed.was_loaded = True
        return method(this(), *args, **kwargs)

    model.load_weights = noted


def has_new_weights(worker: Any) -> bool:
    """Whether weights of a worker have changed since its factors were found, and are all there."""
    # Between `start_weight_update` and `finish_weight_update` a model is half the old one and half the new one. Some
    # ways of transfer write to `parameter.data` without a loader.
    if getattr(worker, "_weight_update_active", False):
        for _, followed in _models_of(worker):
            followed.was_loaded = True
        return False
    return any(_is_stale(model, followed) for model, followed in _models_of(worker))


def has_touched_weights(worker: Any) -> bool:
    """Whether any weight of a worker has changed since its factors were found, or is about to."""
    if getattr(worker, "_weight_update_active", False):
        return True
    return any(followed.was_loaded or followed.version != _version(model) for model, followed in _models_of(worker))


def calibrate_again(worker: Any) -> bool:
    """Find the factors of a worker's models anew, in place, as CUDA graphs keep their addresses.

    Returns:
        Whether any factor is another one than before.
    """
    with set_current_vllm_config(worker.vllm_config):
        return any([_calibrate(model, followed, worker) for model, followed in _models_of(worker)])


def _models_of(worker: Any) -> list[tuple[nn.Module, Followed]]:
    # Target and drafts of an engine register their layers in one mapping.
    layers = worker.vllm_config.compilation_config.static_forward_context
    found = list(_followed.items())
    return [x for x in found if x[1].vllm_config.compilation_config.static_forward_context is layers]


def _is_stale(model: nn.Module, followed: Followed) -> bool:
    if any(parameter.is_meta for parameter in model.parameters()):  # vLLM is in the middle of loading them
        return False
    return followed.was_loaded or followed.version != _version(model)


def _version(model: nn.Module) -> int:
    return sum(0 if parameter.is_inference() else parameter._version for parameter in model.parameters())


def _calibrate(model: nn.Module, followed: Followed, worker: Any = None) -> bool:
    """Take over what layers derive from the weights of their model.

    Args:
        worker: the one that serves the model, if it does already.

    Returns:
        Whether any factor is another one than before.
    """
    vllm_config = followed.vllm_config
    layers = [module for module in model.modules() if is_ours(module)]
    for layer in layers:
        layer.impl.update_sinks()
    followed.version, followed.was_loaded = _version(model), False
    if not layers or not Int8KVConfig.from_additional_config(vllm_config.additional_config).equalize_keys:
        return False
    before = [layer.impl.key_transform.equalizer for layer in layers]
    problem = _why_not(model, vllm_config)
    if problem is None:
        try:
            if worker is not None and vllm_config.lora_config is not None:
                # Factors are those of the model alone, as when it is loaded.
                worker.model_runner._set_active_loras((0,), (0,) * NUM_TOKENS, set())
            _run(model, vllm_config, followed.model_config)
        except Exception as error:  # whatever a model raises when it is run outside of a batch
            problem = f"its pass over random tokens failed ({type(error).__name__}: {error})"
    changed = [_keep(layer, old, is_found=problem is None) for layer, old in zip(layers, before, strict=True)]
    _log(type(model).__name__, layers, problem)
    return any(changed)


def _keep(layer: nn.Module, before: torch.Tensor | None, *, is_found: bool) -> bool:
    """Make the factors of a layer lasting, in the tensor of the ones before; returns whether they differ."""
    found = layer.impl.key_transform.equalizer if is_found else None
    if before is None:
        # A buffer, and no inference tensor, so that vLLM's sleep mode saves it and can write it back in place.
        lasting = None if found is None else found.clone()
        layer.register_buffer("int8kv_key_equalizer", lasting, persistent=False)
        is_changed = lasting is not None
    else:
        lasting, new = before, torch.ones_like(before) if found is None else found
        is_changed = not torch.equal(before, new)
        before.copy_(new)
    layer.impl.key_transform = replace(layer.impl.key_transform, equalizer=lasting)
    return is_changed


def _why_not(model: nn.Module, vllm_config: Any) -> str | None:
    """Why a model cannot be run here, if so."""
    if vllm_config.kv_transfer_config is not None and not is_store(vllm_config):
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


def _run(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Run the model on random tokens; meanwhile `running` tells its layers to set their factors."""
    global _running
    device = vllm_config.device_config.device
    # Of the model as it is published; `max_model_len` is what this engine allows of it.
    num_positions, _ = model_config.model_arch_config.derived_max_model_len_and_key
    num_positions = UNKNOWN_NUM_POSITIONS if math.isinf(num_positions) else int(num_positions)
    positions = calibration_positions(num_positions).to(device)
    num_tokens = len(positions)
    input_ids = calibration_token_ids(num_tokens, model_config.get_vocab_size()).to(device)
    if model_config.uses_mrope:
        positions = positions.expand(3, -1)
    options = {"num_tokens": num_tokens, "slot_mapping": {}, "skip_compiled": True}
    _running = Pass()
    try:
        with torch.inference_mode(), set_forward_context(None, vllm_config, **options):
            model(input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
    finally:
        _running = None


def _log(model: str, layers: Sequence[Any], problem: str | None) -> None:
    """Say what was done with a model, and to whoever debugs it with every layer."""
    if problem is not None:
        logger.warning("INT8 KV cache: keys of %s are not equalized: %s", model, problem)
        return
    # The common factor of a head means nothing, so outliers show relative to the median.
    largest = {
        layer.layer_name: (factors / factors.median(dim=-1, keepdim=True).values).max().item()
        for layer in layers
        if (factors := layer.impl.key_transform.equalizer) is not None
    }
    for name, factor in largest.items():
        logger.debug("INT8 KV cache: largest key factor of %s against its median channel: %.0fx", name, factor)
    most = max(largest, key=largest.__getitem__, default="none")
    logger.info(
        "INT8 KV cache: channels of keys equalized in %d layer(s) of %s; largest factor against the median channel: "
        "%.0fx (%s), %.0fx in the median layer",
        len(largest),
        model,
        largest.get(most, 1),
        most,
        sorted(largest.values())[len(largest) // 2] if largest else 1,
    )

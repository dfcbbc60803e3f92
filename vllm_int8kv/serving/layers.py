"""The attention layers of a model while it is built and loaded: which cache and which format each of them has.

vLLM decides layer by layer, from the layer's own index, whether its cache is quantized. That is not enough for a layer
that reads the cache of another one, for a draft model beside a target with a policy, or for a model whose code forgets
to hand the choice on. `lifecycle` calls `settle_cache_config` before each layer is built, `assign_format` after it, and
`check_layers` when the model has been loaded.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_int8kv.cache.formats import FORMATS, MAX_CUDA_HEAD_SIZE, CacheFormat
from vllm_int8kv.config import DEFAULT_FORMAT, KV_CACHE_DTYPE, Int8KVConfig, read_layer_policy

logger = init_logger("vllm.int8kv")

UNQUANTIZED = "auto"
"""What a layer policy calls a layer that keeps the model's dtype."""
SLIDING_WINDOW = "sliding_window"
"""In `kv_cache_dtype_skip_layers`: all layers with a sliding window."""


def is_draft(model_config: Any) -> bool:
    """Whether a model guesses tokens for another one."""
    return model_config.runner == "draft"


def policy_of(vllm_config: Any, model_config: Any) -> dict[int, str]:
    """The option `layer_policy` as it holds for a model; it is about the target, so a draft has none.

    Raises:
        ValueError: the policy cannot be read or names something that does not exist.
    """
    options = Int8KVConfig.from_additional_config(vllm_config.additional_config)
    if options.layer_policy is None or is_draft(model_config):
        return {}
    return read_layer_policy(options.layer_policy, model_config.get_total_num_hidden_layers(), FORMATS)


@dataclass(frozen=True)
class Build:
    """What holds for all layers of a model that is being built."""

    uniform_format: CacheFormat = FORMATS[DEFAULT_FORMAT]
    """Of layers that no policy names."""
    formats: Mapping[int, CacheFormat] = field(default_factory=dict)
    """By layer index, of the others."""
    skipped_elsewhere: frozenset[str] = frozenset()
    """Names in `kv_cache_dtype_skip_layers` that are about another model."""


_build = Build()


@contextmanager
def building(vllm_config: Any, model_config: Any) -> Iterator[None]:
    """Meanwhile layers that are built belong to the model of `model_config`."""
    global _build
    options = Int8KVConfig.from_additional_config(vllm_config.additional_config)
    skipped_elsewhere: frozenset[str] = frozenset()
    if is_draft(model_config) and options.layer_policy is not None:
        policy = read_layer_policy(options.layer_policy, None, FORMATS)
        skipped_elsewhere = frozenset(str(layer) for layer, name in policy.items() if name == UNQUANTIZED)
    policy = policy_of(vllm_config, model_config)
    formats = {layer: FORMATS[name] for layer, name in policy.items() if name != UNQUANTIZED}
    before, _build = _build, Build(FORMATS[options.format], formats, skipped_elsewhere)
    try:
        yield
    finally:
        _build = before


def settle_cache_config(cache_config: Any, layer_name: str, owner: nn.Module | None, sliding_window: int | None) -> Any:
    """The cache configuration from which vLLM shall build a layer.

    Args:
        cache_config: what the code of the model passes on, a `CacheConfig` or None.
        owner: the layer whose cache this one reads, if it reads another one's.
        sliding_window: of this layer alone, if it has one of its own.

    Returns:
        `cache_config`, or a copy whose list of skipped layers decides as it must.
    """
    if cache_config is None or cache_config.cache_dtype != KV_CACHE_DTYPE:
        return cache_config
    if not cache_config.kv_cache_dtype_skip_layers and owner is None:
        return cache_config
    skip_layers = [name for name in cache_config.kv_cache_dtype_skip_layers if name not in _build.skipped_elsewhere]
    index = _index(layer_name)
    window = cache_config.sliding_window if sliding_window is None else sliding_window
    is_skipped = str(index) in skip_layers or (SLIDING_WINDOW in skip_layers and window is not None)
    if owner is not None and is_skipped == is_ours(owner):
        is_skipped = not is_skipped
        logger.info_once(
            "INT8 KV cache: %s reads the cache of %s, and is %s as that one is, whatever kv_cache_dtype_skip_layers or "
            "layer_policy say of it",
            layer_name,
            owner.layer_name,
            "unquantized" if is_skipped else "quantized",
        )
    settled = copy.copy(cache_config)
    settled.kv_cache_dtype_skip_layers = []
    if is_skipped:
        # Attention looks at the list, after a checkpoint's own scheme; chunked local attention at the dtype alone.
        settled.cache_dtype, settled.kv_cache_dtype_skip_layers = UNQUANTIZED, [str(index)]
    return settled


def _index(layer_name: str) -> int:
    """The index of a layer in its model.

    Raises:
        ValueError: its name has none, so that no list can be about it.
    """
    try:
        return extract_layer_index(layer_name)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"layer {layer_name!r} has no index that kv_cache_dtype_skip_layers or layer_policy could name ({error}); "
            "leave them out for this model"
        ) from error


def is_ours(module: nn.Module) -> bool:
    """Whether a module is an attention layer with this cache."""
    return isinstance(getattr(getattr(module, "impl", None), "cache_format", None), CacheFormat)


def assign_format(layer: Any) -> None:
    """Give a layer that was just built the backend class of its format; a reader of another cache that one's.

    Args:
        layer: vLLM's `Attention` with an `Int8KVImpl`.

    Raises:
        ValueError: the layer is on a GPU, and there are no CUDA kernels of that format for its head size.
    """
    owner, cache_format = layer.kv_sharing_target_layer_name or layer.layer_name, _build.uniform_format
    if _build.formats:
        cache_format = _build.formats.get(_index(owner), cache_format)
    if current_platform.is_cuda() and not cache_format.has_cuda_kernels(layer.impl.head_size):
        raise ValueError(
            f"{layer.layer_name} has head_size {layer.impl.head_size}, but the CUDA kernels of the cache format "
            f"{cache_format.name} have head sizes up to {MAX_CUDA_HEAD_SIZE}; give the layer {DEFAULT_FORMAT}"
        )
    layer.impl.cache_format = cache_format
    layer.attn_backend = layer.attn_backend.of_format(layer.impl.cache_format)


def check_layers(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Count which attention layers of a loaded model use the cache that was asked for.

    Raises:
        ValueError: none does, or a name in `kv_cache_dtype_skip_layers` is about no layer.
    """
    decoders = [layer for layer in model.modules() if _has_kv_cache(layer)]
    others: dict[str, list[str]] = {}
    for layer in decoders:
        if not is_ours(layer):
            others.setdefault(_why_not(layer, vllm_config.cache_config), []).append(layer.layer_name)
    skip_layers = vllm_config.cache_config.kv_cache_dtype_skip_layers
    # A stage of a pipeline has only some of the layers, and a draft may have none of those that are named.
    is_whole = vllm_config.parallel_config.pipeline_parallel_size == 1 and not is_draft(model_config)
    if SLIDING_WINDOW in skip_layers and is_whole and all(layer.sliding_window is None for layer in decoders):
        raise ValueError(
            f"kv_cache_dtype_skip_layers names {SLIDING_WINDOW!r}, but no layer of {type(model).__name__} has a "
            "sliding window"
        )
    if not others:
        return
    reasons = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in others.items())
    if is_whole and sum(map(len, others.values())) == len(decoders):
        raise ValueError(
            f"kv_cache_dtype={KV_CACHE_DTYPE!r} would be used by no layer of {type(model).__name__} ({reasons}); use "
            "kv_cache_dtype='auto'"
        )
    logger.info_once("INT8 KV cache: layers of %s without it: %s", type(model).__name__, reasons)


def _has_kv_cache(module: nn.Module) -> bool:
    """Whether a module is an attention layer whose tokens stay in a KV cache."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.attention.backend import AttentionType

    return isinstance(module, Attention) and module.attn_type == AttentionType.DECODER


def _why_not(layer: Any, cache_config: Any) -> str:
    """Why a layer is not quantized."""
    skip_layers = cache_config.kv_cache_dtype_skip_layers
    if layer.kv_sharing_target_layer_name is not None:
        return "they read the cache of a layer that is left unquantized"
    if skip_layers and (SLIDING_WINDOW in skip_layers or str(_index(layer.layer_name)) in skip_layers):
        return "left unquantized by kv_cache_dtype_skip_layers or layer_policy"
    return "vLLM's code of this model does not hand the KV cache dtype to them"


def check_shared_caches(layers: Mapping[str, Any]) -> None:
    """Make sure that layers which read the cache of another layer understand it, and take its format.

    Most are built to, see `settle_cache_config`; drafts may be told only afterwards whose cache they read.

    Args:
        layers: vLLM's attention layers of all models of an engine, by name.

    Raises:
        ValueError: one of a pair is quantized, and the other is not.
    """
    for layer in layers.values():
        owner = layers.get(getattr(layer, "kv_sharing_target_layer_name", None))
        if owner is None or not (is_ours(layer) or is_ours(owner)):
            continue
        if is_ours(layer) != is_ours(owner):
            raise ValueError(
                f"{layer.layer_name} reads the KV cache of {owner.layer_name}, but its KV cache dtype is "
                f"{layer.kv_cache_dtype!r} and that one's {owner.kv_cache_dtype!r}; they must be the same "
                "(speculative_config has a kv_cache_dtype for drafts)"
            )
        layer.impl.cache_format = owner.impl.cache_format

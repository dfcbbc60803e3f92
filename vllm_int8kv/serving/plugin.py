"""Every touch of vLLM's registries: the name `int8_custom`, the backend, the checks at start-up.

vLLM calls `register()` in every process, before it knows whether anybody wants this cache, so it imports no
kernel and starts no CUDA. vLLM 0.33 has an official registration for KV cache dtypes; vLLM 0.32 has none, and
what is patched there says why and until when. The backend is chosen by wrapping the platform in both, because
no platform asks out-of-tree backends which KV cache dtypes they serve.
"""

import functools
import importlib
import sys
from typing import Any, Literal, get_args

from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.serving import lifecycle
from vllm_int8kv.serving.start_up.checks import BACKEND_NAME, check_engine, check_other_engine, refuse_unsupported

BACKEND_PATH = "vllm_int8kv.serving.backend.Int8KVBackend"
OLDEST_VLLM, NEWEST_VLLM = (0, 32), (0, 33)
_SUPPORTED_RANGE = "0.32 to 0.33"

COMMON_SYMBOLS = (
    "vllm:__version__",
    "vllm.platforms:current_platform.get_attn_backend_cls",
    "vllm.platforms:current_platform.check_and_update_config",
    "vllm.platforms:current_platform.get_device_capability",
    "vllm.v1.attention.backends.registry:AttentionBackendEnum.__members__",
    "vllm.v1.attention.backends.registry:register_backend",
)
OFFICIAL_SYMBOLS = (
    "vllm.config.cache:register_kv_cache_dtype",
    "vllm.config.cache:get_kv_cache_dtype_handler",
    "vllm.v1.kv_cache_interface:KVQuantMode.NONE",
)
PATCHED_SYMBOLS = (
    "vllm.config.cache:CacheDType",
    "vllm.config:CacheConfig.__pydantic_fields__",
    "vllm.config:SpeculativeConfig.__pydantic_fields__",
    "vllm.config:VllmConfig.__pydantic_fields__",
    "vllm.utils.torch_utils:STR_DTYPE_TO_TORCH_DTYPE",
)
"""Upstream symbols, `module:attribute`, without which nothing is registered; `lifecycle.SYMBOLS` has those that are
too slow to import for a look."""


class UnsupportedVLLMError(RuntimeError):
    """The installed vLLM lacks something the plugin needs."""


def register() -> None:
    """Teach this process's vLLM the KV cache dtype `int8_custom`. Idempotent.

    With a vLLM outside the supported range nothing is registered: an error is logged, vLLM works on without
    the plugin, and refuses `int8_custom` as an unknown value.
    """
    from vllm.logger import init_logger

    try:
        official = vllm_version() >= (0, 33)
        for symbol in COMMON_SYMBOLS + (OFFICIAL_SYMBOLS if official else PATCHED_SYMBOLS):
            resolve(symbol)
    except UnsupportedVLLMError as error:
        init_logger("vllm.int8kv").error("kv_cache_dtype=%r is not available: %s", KV_CACHE_DTYPE, error)
        return
    if official:
        _register_dtype_officially()
    else:
        _patch_dtype_into_vllm_032()
    _register_backend()
    _wrap_platform()
    lifecycle.follow_processes()


def resolve(symbol: str) -> Any:
    """The upstream object named `module:attribute.attribute`. Raises UnsupportedVLLMError if it is gone."""
    module_name, _, path = symbol.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise UnsupportedVLLMError(
            f"the installed vLLM has no {symbol} ({error}); install a released vLLM {_SUPPORTED_RANGE}"
        ) from error


def vllm_version() -> tuple[int, int]:
    """Major and minor version. Raises UnsupportedVLLMError outside the supported range."""
    import vllm

    major, minor = [*vllm.__version__.split("."), ""][:2]
    version = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    if version is None or not OLDEST_VLLM <= version <= NEWEST_VLLM:
        raise UnsupportedVLLMError(
            f"vLLM {vllm.__version__} is installed, this vllm-int8kv supports {_SUPPORTED_RANGE}; install one of "
            "those, or another version of vllm-int8kv"
        )
    return version


# What vLLM is told about the dtype: tensors are torch.int8 and KVQuantMode is NONE, so that both functions
# named is_quantized_kv_cache answer False. They do not ask whether bytes are saved, but whether vLLM's own fp8
# machinery applies: checkpoint k_scale and v_scale are loaded (quantization/kv_cache.py), "a proper scaling
# factor" is asked for (CacheConfig), and the native backend of an unquantized layer next to ours plans with
# fp8 (FlashAttention's scheduler metadata) or refuses its head size (CPU_ATTN). None of it is ours.
# KVQuantMode.CUSTOM of 0.33 reads as quantized and, by a clash of values, also as OCTAVE_K3V4.
# What tells our layers from unquantized ones is the dtype of their spec.


def _register_dtype_officially() -> None:
    """vLLM >= 0.33: RFC vllm-project/vllm#51751."""
    import torch
    from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    if get_kv_cache_dtype_handler(KV_CACHE_DTYPE) is not None:
        return

    @register_kv_cache_dtype(KV_CACHE_DTYPE)
    class Int8KVCacheDType:
        name = KV_CACHE_DTYPE

        def torch_dtype(self) -> torch.dtype:
            return torch.int8

        def quant_mode(self) -> KVQuantMode:
            return KVQuantMode.NONE


def _patch_dtype_into_vllm_032() -> None:
    """vLLM 0.32 keeps the KV cache dtypes in a closed `Literal`.

    Symptom: `CacheConfig`, the command line and the attention selector refuse "int8_custom". Upstream: RFC
    vllm-project/vllm#51751, PR #52670. Remove with support for 0.32.
    """
    import torch
    import vllm.config.cache
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    narrow = vllm.config.cache.CacheDType
    if KV_CACHE_DTYPE in get_args(narrow):
        return
    wide = Literal[(*get_args(narrow), KV_CACHE_DTYPE)]
    STR_DTYPE_TO_TORCH_DTYPE[KV_CACHE_DTYPE] = torch.int8
    # Every module that imported the literal holds its own reference; later ones import the wide one.
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, "CacheDType", None) is narrow:
            module.CacheDType = wide
    _widen_dataclasses(wide)


def _widen_dataclasses(wide: Any) -> None:
    """Pydantic compiled its validators, and the command line its choices, from the narrow literal."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig, VllmConfig

    for cls, name, annotation in (
        (CacheConfig, "cache_dtype", wide),
        (SpeculativeConfig, "kv_cache_dtype", wide | None),
    ):
        cls.__annotations__[name] = annotation
        cls.__dataclass_fields__[name].type = annotation
        cls.__pydantic_fields__[name].annotation = annotation
        rebuild_dataclass(cls, force=True)
    # Its validator contains a copy of theirs.
    rebuild_dataclass(VllmConfig, force=True)
    # Worker processes do without the command line; imported later, it sees the wide literal by itself.
    if arg_utils := sys.modules.get("vllm.engine.arg_utils"):
        arg_utils.EngineArgs.__annotations__["kv_cache_dtype"] = wide
        arg_utils.EngineArgs.__dataclass_fields__["kv_cache_dtype"].type = wide
        arg_utils._compute_kwargs.cache_clear()


def _register_backend() -> None:
    """Give the backend a name: `Attention` looks up `AttentionBackendEnum[backend.get_name()]`."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_PATH)


def _wrap_platform() -> None:
    """Choose and check the backend where vLLM asks its platform.

    Symptom: CPU returns CPU_ATTN whatever is selected, CUDA tries only its own list of backends, and neither
    has a hook for another. Upstream: out of scope of RFC vllm-project/vllm#51751, which is for platforms. Remove
    when a registered KV cache dtype can name its backend.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform.get_attn_backend_cls, "is_int8kv_wrapper", False):
        return
    choose_backend = platform.get_attn_backend_cls
    update_config = platform.check_and_update_config

    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if attn_selector_config.kv_cache_dtype != KV_CACHE_DTYPE:
            return choose_backend(selected_backend, attn_selector_config, num_heads=num_heads)
        refuse_unsupported(attn_selector_config._asdict())
        return BACKEND_PATH

    def check_and_update_config(cls, vllm_config):
        update_config(vllm_config)
        if vllm_config.compilation_config.static_forward_context:
            # The target has been built: this configuration was derived from its checked one, for a draft, one field
            # after the other, so that it need not make sense yet.
            return
        if lifecycle.uses_this_cache(vllm_config):
            check_engine(vllm_config, choose_backend)
            lifecycle.follow_processes(import_them=True)
        else:
            check_other_engine(vllm_config)

    get_attn_backend_cls.is_int8kv_wrapper = True
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform.check_and_update_config = classmethod(check_and_update_config)

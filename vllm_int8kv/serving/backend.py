"""vLLM's attention backend for `kv_cache_dtype="int8_custom"`: what vLLM asks before it makes a layer or a cache.

vLLM hands over one tensor per layer, `[num_blocks, num_kv_heads, block_size, content_bytes]` int8 with the bytes of a
(block, KV head) pair contiguous (its layout LBHNC); the layer's `CacheFormat` says what the bytes are.
"""

from dataclasses import replace
from functools import cache
from typing import ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec, SinkFullAttentionSpec

from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import K8V8, SLOT_GROUP, SUPPORTED_HEAD_SIZES, CacheFormat
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.serving.attention import Int8KVImpl
from vllm_int8kv.serving.metadata import Int8KVMetadataBuilder


class Int8KVBackend(AttentionBackend):
    """Decoder attention over the INT8 cache, on CPU and CUDA; a subclass per format, see `of_format`."""

    cache_format: ClassVar[CacheFormat] = K8V8
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = [KV_CACHE_DTYPE]

    @classmethod
    def of_format(cls, cache_format: CacheFormat) -> type["Int8KVBackend"]:
        """This backend with another format; the same class for the same format, as vLLM groups layers by it.

        vLLM subclasses backends too, for layers with chunked attention for example; their subclasses stay what they
        are.
        """
        return cls if cls.cache_format == cache_format else _subclass(cls, cache_format)

    @staticmethod
    def get_name() -> str:
        return "INT8_KV"

    @staticmethod
    def get_impl_cls() -> type[Int8KVImpl]:
        return Int8KVImpl

    @staticmethod
    def get_builder_cls() -> type[Int8KVMetadataBuilder]:
        return Int8KVMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(SLOT_GROUP)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Slots of a block where the user asks for no number.

        On a GPU at least 64: a chunk of 16 slots with head_size 128 takes 4,160 bytes, so that every second one would
        begin in the middle of a 128-byte line.
        """
        preferred = super().get_preferred_block_size(default_block_size)
        return max(preferred, 64) if current_platform.is_cuda() else preferred

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True  # of a checkpoint, which are not used: every vector is stored with a scale of its own

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return current_platform.is_cpu()

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability is None or capability >= library.MIN_COMPUTE_CAPABILITY

    @classmethod
    def supports_combination(cls, *args, **kwargs) -> str | None:
        """The reason why this installation cannot serve this platform, or None."""
        if current_platform.is_cuda():
            return None if library.has_cuda_kernels() else "vllm-int8kv was installed without its CUDA kernels"
        return None if current_platform.is_cpu() else f"platform {current_platform.device_name} not supported"

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Tell vLLM's block manager how many bytes a slot really takes.

        vLLM also asks this of specs that are not ours: of unquantized layers named in
        `kv_cache_dtype_skip_layers` (their spec has the model dtype) and again of its own result.

        Raises:
            ValueError: a layer whose K and V differ in size, or that keeps static sink tokens in its cache.
        """
        if spec.dtype != torch.int8 or spec.state_content_bytes is not None:
            return spec
        if spec.head_size_v != spec.head_size:
            raise ValueError(
                f"kv_cache_dtype={KV_CACHE_DTYPE!r} needs layers with equal K and V head sizes, got head_size "
                f"{spec.head_size} and head_size_v {spec.head_size_v}; use kv_cache_dtype='auto' for this model"
            )
        if isinstance(spec, SinkFullAttentionSpec):
            raise ValueError(
                f"kv_cache_dtype={KV_CACHE_DTYPE!r} does not support static sink tokens, which vLLM writes to the "
                "cache unquantized; use kv_cache_dtype='auto' for this model"
            )
        return replace(spec, state_content_bytes=cls.cache_format.content_bytes(spec.head_size))


@cache
def _subclass(backend: type[Int8KVBackend], cache_format: CacheFormat) -> type[Int8KVBackend]:
    name = f"{backend.__name__}_{cache_format.name}"
    return type(name, (backend,), {"cache_format": cache_format, "__module__": __name__, "__qualname__": name})

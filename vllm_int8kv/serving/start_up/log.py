"""What the backend says once per worker about the cache it made."""

from collections import Counter

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import native_content_bytes
from vllm_int8kv.config import KV_CACHE_DTYPE, Int8KVConfig

logger = init_logger("vllm.int8kv")


def log_cache_format(spec: AttentionSpec, vllm_config: VllmConfig, options: Int8KVConfig, device: torch.device) -> None:
    """Say once per worker what was chosen and what it saves, over all layers that own a cache."""
    padding = spec.page_size_bytes / spec.unpadded_page_size_bytes
    itemsize = vllm_config.model_config.dtype.itemsize
    int8_bytes = native_bytes = skipped = 0
    formats: Counter[str] = Counter()
    for layer in get_layers_from_vllm_config(vllm_config, Attention).values():
        if layer.kv_sharing_target_layer_name is not None or layer.attn_type != AttentionType.DECODER:
            continue
        native = layer.num_kv_heads * native_content_bytes(layer.head_size, itemsize)
        native_bytes += native
        if layer.kv_cache_dtype == KV_CACHE_DTYPE:
            content_bytes = layer.impl.cache_format.content_bytes(layer.head_size)
            formats[layer.impl.cache_format.name] += 1
            # Padding is known of the layers that this specification is about.
            is_padded = content_bytes == spec.state_content_bytes
            int8_bytes += layer.num_kv_heads * content_bytes * (padding if is_padded else 1)
        else:
            int8_bytes += native
            skipped += 1
    logger.info_once(
        "INT8 KV cache: %s, %.2f bits in the mean, keys %s, %s kernels; %d bytes per token instead of %d (%s), %.2fx "
        "the tokens in the same memory; %d layer(s) left unquantized",
        ", ".join(f"{name} in {count} layer(s)" for name, count in sorted(formats.items())),
        8 * itemsize * int8_bytes / native_bytes,
        "rotated" if options.rotate_keys else "not rotated",
        (options.cpu_isa or library.cpu_isa()) if device.type == "cpu" else device.type,
        int8_bytes,
        native_bytes,
        str(vllm_config.model_config.dtype).removeprefix("torch."),
        native_bytes / int8_bytes,
        skipped,
    )
    if padding > 1:
        logger.warning_once(
            "INT8 KV cache: vLLM pads blocks from %d to %d bytes, the size of other layers' blocks, which costs "
            "capacity; it does so where sliding-window and full-attention layers differ in their KV cache dtype",
            spec.unpadded_page_size_bytes,
            spec.page_size_bytes,
        )

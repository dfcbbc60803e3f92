"""Quantization schemes for K and V as plain PyTorch: what a cache would give back.

Used by `python -m benchmarks.accuracy schemes`.

Tensors are [num_tokens, num_kv_heads, head_size] fp32, keys after RoPE. `bytes_per_token` counts K and V of one KV
head with scales; static scales, shared by all tokens, count nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_int8kv.cache.equalization import key_equalizer
from vllm_int8kv.cache.formats import K8V8, native_content_bytes
from vllm_int8kv.cache.key_transform import KeyTransform

FP8_MAX = 448.0
GROUP = 32


@dataclass(frozen=True)
class Calibration:
    """What a scheme may know of one layer beforehand."""

    equalizer: torch.Tensor
    """[num_kv_heads, head_size], from random tokens, as the plugin finds it."""
    k_amax: torch.Tensor
    """[num_kv_heads, head_size], largest magnitude per channel in another text."""
    v_amax: torch.Tensor

    @classmethod
    def from_tensors(
        cls, random_query: torch.Tensor, random_key: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> "Calibration":
        return cls(key_equalizer(random_query, random_key), key.abs().amax(dim=0), value.abs().amax(dim=0))


Tensors = tuple[torch.Tensor, torch.Tensor]


def per_vector_fp32(x: torch.Tensor) -> torch.Tensor:
    """Symmetric, one fp32 scale per vector: vLLM's int8_per_token_head."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return torch.round(x / scales) * scales


def asymmetric(x: torch.Tensor) -> torch.Tensor:
    """fp16 scale and zero point per vector: LMDeploy's quant_policy=8."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 255).clamp_min(1e-7).half().float()
    zero = (-low / scales).half().float()
    return (torch.clamp(torch.round(x / scales + zero), 0, 255) - zero) * scales


def grouped(x: torch.Tensor) -> torch.Tensor:
    """Symmetric, one fp16 scale per 32 elements: llama.cpp's q8_0."""
    groups = x.unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(dim=-1, keepdim=True) / 127).half().float().clamp_min(1e-7)
    return (torch.round(groups / scales).clamp(-127, 127) * scales).flatten(-2)


def per_channel(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Symmetric, static scales per channel from another text, larger values clipped (arXiv 2601.04719)."""
    scales = amax.clamp_min(1e-7) / 127
    return torch.round(x / scales).clamp(-127, 127) * scales


def fp8(x: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """e4m3 with a scale per tensor; vLLM's is 1 unless the checkpoint has another."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale


def int8_custom(key: torch.Tensor, value: torch.Tensor, transform: KeyTransform) -> Tensors:
    """Keys and values through the cache of this project, keys back in their own coordinates."""
    return transform.undo_keys(K8V8.round_trip_k(transform.keys(key))), K8V8.round_trip_v(value)


@dataclass(frozen=True)
class Scheme:
    """One row of the table."""

    name: str
    meaning: str
    bytes_per_token: Callable[[int], float]
    """Of one KV head, K and V, by head size."""
    apply: Callable[[torch.Tensor, torch.Tensor, Calibration], Tensors]
    """(key, value, calibration) -> what the cache gives back."""


SCHEMES = [
    Scheme(
        "bf16",
        "bf16",
        lambda d: native_content_bytes(d, 2),
        lambda k, v, c: (k.bfloat16().float(), v.bfloat16().float()),
    ),
    Scheme(
        "int8_custom",
        "int8_custom: rotated, equalized",
        K8V8.content_bytes,
        lambda k, v, c: int8_custom(k, v, KeyTransform(equalizer=c.equalizer)),
    ),
    Scheme(
        "rotated",
        "rotated keys only",
        K8V8.content_bytes,
        lambda k, v, c: int8_custom(k, v, KeyTransform()),
    ),
    Scheme(
        "equalized",
        "equalized keys only",
        K8V8.content_bytes,
        lambda k, v, c: int8_custom(k, v, KeyTransform(rotate=False, equalizer=c.equalizer)),
    ),
    Scheme(
        "per_token_head",
        "per (token, head): vLLM's `int8_per_token_head`",
        lambda d: 2 * d + 8,
        lambda k, v, c: (per_vector_fp32(k), per_vector_fp32(v)),
    ),
    Scheme(
        "asymmetric",
        "asymmetric per (token, head): LMDeploy",
        lambda d: 2 * d + 8,
        lambda k, v, c: (asymmetric(k), asymmetric(v)),
    ),
    Scheme(
        "group32", "groups of 32: llama.cpp q8_0", lambda d: 2 * d + d / 8, lambda k, v, c: (grouped(k), grouped(v))
    ),
    Scheme(
        "per_channel",
        "static per channel: arXiv 2601.04719",
        lambda d: 2 * d,
        lambda k, v, c: (per_channel(k, c.k_amax), per_channel(v, c.v_amax)),
    ),
    Scheme("fp8", "FP8 e4m3, scale 1: vLLM's `fp8`", lambda d: 2 * d, lambda k, v, c: (fp8(k), fp8(v))),
    Scheme(
        "fp8_calibrated",
        "FP8 e4m3, calibrated per tensor",
        lambda d: 2 * d,
        lambda k, v, c: (fp8(k, c.k_amax.amax() / FP8_MAX), fp8(v, c.v_amax.amax() / FP8_MAX)),
    ),
    Scheme(
        "int8_custom_values_only",
        "int8_custom, values only",
        lambda d: 3 * d + 2,
        lambda k, v, c: (k, K8V8.round_trip_v(v)),
    ),
]

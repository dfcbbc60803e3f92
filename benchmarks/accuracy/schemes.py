"""Quantization schemes for K and V as plain PyTorch: what a cache would give back.

Used by `python -m benchmarks.accuracy schemes`.

Tensors are [num_tokens, num_kv_heads, head_size] fp32, keys after RoPE. `bytes_per_token` counts K and V of one KV
head with scales; static scales, shared by all tokens, count nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.accuracy import quantizers
from benchmarks.accuracy.quantizers import GROUP
from vllm_int8kv.cache.equalization import key_equalizer
from vllm_int8kv.cache.formats import FORMATS, K8V8, SCALE_DTYPE, CacheFormat, native_content_bytes
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.evaluation.tuning.schemes import FP8_MAX


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
Apply = Callable[[torch.Tensor, torch.Tensor, Calibration], Tensors]
"""(key, value, calibration) -> what the cache gives back."""


@dataclass(frozen=True)
class Scheme:
    """One row of the table."""

    name: str
    meaning: str
    bytes_per_token: Callable[[int], float]
    """Of one KV head, K and V, by head size."""
    apply: Apply

    def bits_per_element(self, head_size: int) -> float:
        """Scales and padding included."""
        return 8 * self.bytes_per_token(head_size) / (2 * head_size)


def through_cache(
    cache_format: CacheFormat, key: torch.Tensor, value: torch.Tensor, transform: KeyTransform
) -> Tensors:
    """Keys and values through a cache of this project, keys back in their own coordinates."""
    keys = cache_format.round_trip_k(transform.keys(key))
    return transform.undo_keys(keys), cache_format.round_trip_v(value)


def stored(name: str, meaning: str, cache_format: CacheFormat, rotate: bool = True, equalize: bool = True) -> Scheme:
    """A cache format of this project, with or without what is done to keys before."""

    def apply(k: torch.Tensor, v: torch.Tensor, c: Calibration) -> Tensors:
        return through_cache(cache_format, k, v, KeyTransform(rotate, c.equalizer if equalize else None))

    return Scheme(name, meaning, cache_format.content_bytes, apply)


def both(quantize: Callable[[torch.Tensor], torch.Tensor]) -> Apply:
    """A quantizer that K and V go through alike."""
    return lambda k, v, c: (quantize(k), quantize(v))


def kivi(bits: int) -> Scheme:
    """KIVI (arXiv 2402.02750) in groups of 32, without its window of unquantized tokens, which costs memory as well."""
    return Scheme(
        f"kivi{bits}",
        f"KIVI in groups of {GROUP}, {bits} bits, no unquantized window",
        lambda d: 2 * (d * bits / 8 + d / GROUP * 4),
        lambda k, v, c: (quantizers.kivi_keys(k, bits), quantizers.kivi_values(v, bits)),
    )


def fp8_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """e4m3 as vLLM's kernel for CPUs writes it."""
    from benchmarks.operators.cpu_peers import truncate_to_e4m3

    return truncate_to_e4m3(x)


def alternatives(name: str) -> list[Scheme]:
    """A format with K and V below 8 bits, one of its choices at a time replaced by another one."""
    cache_format = FORMATS[name]

    def values_as_they_are(k: torch.Tensor, v: torch.Tensor, c: Calibration) -> Tensors:
        keys, _ = through_cache(cache_format, k, v, KeyTransform(equalizer=c.equalizer))
        return keys, cache_format.quantize_v(v).dequantize(cache_format.v_bits)

    def with_quantizer(quantize: Callable[[torch.Tensor, int], torch.Tensor]) -> Apply:
        def apply(k: torch.Tensor, v: torch.Tensor, c: Calibration) -> Tensors:
            transform = KeyTransform(equalizer=c.equalizer)
            keys = quantize(transform.keys(k), cache_format.k_bits)
            values = quantize(cache_format.transform_values(v), cache_format.v_bits)
            return transform.undo_keys(keys), cache_format.undo_values(values)

        return apply

    return [
        Scheme(
            f"{name}_values_not_rotated", f"{name}, values not rotated", cache_format.content_bytes, values_as_they_are
        ),
        stored(f"{name}_keys_not_rotated", f"{name}, keys not rotated", cache_format, rotate=False),
        stored(f"{name}_keys_not_equalized", f"{name}, keys not equalized", cache_format, equalize=False),
        Scheme(
            f"{name}_symmetric",
            f"{name}, symmetric: no midpoints",
            lambda d: cache_format.content_bytes(d) - 2 * SCALE_DTYPE.itemsize,
            with_quantizer(quantizers.without_midpoint),
        ),
        Scheme(
            f"{name}_minimum",
            f"{name}, minimum in place of the midpoint",
            cache_format.content_bytes,
            with_quantizer(quantizers.with_bf16_minimum),
        ),
    ]


COMPARED_FORMATS = ("k8v6", "k6v8", "k8v4", "k6v6", "k6v5", "k4v8", "k6v4", "k5v4", "k4v4", "k4v2", "k2v2")
"""Beside k8v8; the pairs (8, x) and (x, 8) show what K and V cost apart."""
ALTERED_FORMATS = ("k6v4", "k4v4")
"""Whose choices are replaced one at a time: in the first V costs most, in the second K."""

EIGHT_BITS = [
    Scheme("bf16", "bf16", lambda d: native_content_bytes(d, 2), both(lambda x: x.bfloat16().float())),
    stored("k8v8", "k8v8, `int8_custom` without options: rotated, equalized", K8V8),
    stored("rotated", "rotated keys only", K8V8, equalize=False),
    stored("equalized", "equalized keys only", K8V8, rotate=False),
    Scheme(
        "per_token_head",
        "per (token, head): vLLM's `int8_per_token_head`",
        lambda d: 2 * d + 8,
        both(quantizers.per_vector_fp32),
    ),
    Scheme("asymmetric", "asymmetric per (token, head): LMDeploy", lambda d: 2 * d + 8, both(quantizers.asymmetric)),
    Scheme("group32", "groups of 32: llama.cpp q8_0", lambda d: 2 * d + d / 8, both(quantizers.grouped)),
    Scheme(
        "per_channel",
        "static per channel: arXiv 2601.04719",
        lambda d: 2 * d,
        lambda k, v, c: (quantizers.per_channel(k, c.k_amax), quantizers.per_channel(v, c.v_amax)),
    ),
    Scheme("fp8", "FP8 e4m3, scale 1: vLLM's `fp8`", lambda d: 2 * d, both(quantizers.fp8)),
    Scheme("fp8_cpu", "FP8 e4m3, rounded toward zero: vLLM's `fp8` on CPU", lambda d: 2 * d, both(fp8_on_cpu)),
    Scheme(
        "fp8_calibrated",
        "FP8 e4m3, calibrated per tensor",
        lambda d: 2 * d,
        lambda k, v, c: (quantizers.fp8(k, c.k_amax.amax() / FP8_MAX), quantizers.fp8(v, c.v_amax.amax() / FP8_MAX)),
    ),
    Scheme(
        "int8_custom_values_only",
        "k8v8, values only",
        lambda d: 3 * d + 2,
        lambda k, v, c: (k, K8V8.round_trip_v(v)),
    ),
]
FEWER_BITS = [
    *(stored(name, name, FORMATS[name]) for name in COMPARED_FORMATS),
    Scheme(
        "int4_per_token_head",
        "4 bits per (token, head), rotated: vLLM's `int4_per_token_head`",
        lambda d: d + 8,
        both(quantizers.int4_per_token_head),
    ),
    kivi(4),
    kivi(2),
]
REPLACED = {name: alternatives(name) for name in ALTERED_FORMATS}

SCHEMES = [*EIGHT_BITS, *FEWER_BITS, *(scheme for schemes in REPLACED.values() for scheme in schemes)]

SECTIONS: dict[str, list[str]] = {
    "8 bits and more": [scheme.name for scheme in EIGHT_BITS],
    "Fewer bits": ["k8v8", *(scheme.name for scheme in FEWER_BITS), "fp8", "fp8_cpu"],
    "Fewer bits, one choice replaced": [
        row for name, schemes in REPLACED.items() for row in (name, *(scheme.name for scheme in schemes))
    ],
}
"""How the table is cut, by names of schemes; what others are compared with is repeated."""

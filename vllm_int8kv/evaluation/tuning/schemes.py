"""What one layer's K and V may go through while a policy is measured, by name.

k6v4          a cache format of this project
k6, v4        only K, or only V, through a cache format; the other one stays exact
plain:k4v4    per-token asymmetric quantization as KVTuner (arXiv 2502.04420) has it; plain:k4 and plain:v4 likewise
fp8, bf16     e4m3 with scale 1, as vLLM's `fp8`; the 16-bit cache
auto          exact
"""

import re
from dataclasses import dataclass
from typing import Self

import torch

from vllm_int8kv.cache.formats import FORMATS, CacheFormat, native_content_bytes

EXACT = "auto"
FP8_MAX = 448.0
FLOAT_BITS = {"fp8": 8, "bf16": 16}
"""Bits of the schemes that are floats."""
PLAIN = "plain"


@dataclass(frozen=True)
class Scheme:
    """A name, taken apart."""

    name: str
    family: str
    """`format`, or what the name begins with: plain, fp8, bf16, auto"""
    k_bits: int | None
    """None if K stays exact"""
    v_bits: int | None

    @classmethod
    def parse(cls, name: str) -> Self:
        """Take a name apart.

        Raises:
            ValueError: it is none.
        """
        if name in FLOAT_BITS:
            return cls(name, name, FLOAT_BITS[name], FLOAT_BITS[name])
        if name == EXACT:
            return cls(name, name, None, None)
        found = re.fullmatch(r"(plain:)?(?=.)(?:k([24568]))?(?:v([24568]))?", name)
        if not found:
            raise ValueError(
                f"expected a cache format, one side of it (k6, v4), plain:k4v4, fp8, bf16 or auto: {name!r}"
            )
        k_bits, v_bits = (None if bits is None else int(bits) for bits in found.groups()[1:])
        return cls(name, PLAIN if found[1] else "format", k_bits, v_bits)

    @property
    def cache_format(self) -> CacheFormat:
        """The format through which K, V or both of them go; a side that stays exact has eight bits in it."""
        return FORMATS[f"k{self.k_bits or 8}v{self.v_bits or 8}"]

    def bytes_per_token(self, head_size: int) -> float:
        """Of K and V of one KV head, scales included.

        Raises:
            ValueError: one side is exact, so there is no such cache.
        """
        if self.k_bits is None or self.v_bits is None:
            raise ValueError(f"{self.name} is no cache")
        if self.family == "format":
            return self.cache_format.content_bytes(head_size)
        codes = native_content_bytes(head_size, 1) * (self.k_bits + self.v_bits) / 16
        return codes + (8 if self.family == PLAIN else 0)  # a scale and a zero point of 16 bits for K and for V


def through_floats(x: torch.Tensor, family: str) -> torch.Tensor:
    """What a cache of floats gives back of fp32 values."""
    if family == "bf16":
        return x.bfloat16().float()
    return through_fp8(x)


def through_fp8(x: torch.Tensor) -> torch.Tensor:
    """The nearest values of e4m3, larger ones clipped."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def through_plain(x: torch.Tensor, bits: int) -> torch.Tensor:
    """KVTuner's quantizer, one scale and zero point per vector: scale = (max - min) / (2^bits - 1), both in 16 bits."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.bfloat16().float()
    scales = ((high - low) / (2**bits - 1)).clamp_min(1e-30).bfloat16().float()
    return torch.round((x - low) / scales).clamp(0, 2**bits - 1) * scales + low

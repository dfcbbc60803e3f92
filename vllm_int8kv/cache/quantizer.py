"""The quantizer of one K or V vector in plain PyTorch. `csrc/format/quantizer.h` states the same, bit for bit."""

from dataclasses import dataclass

import torch

INT8_MAX = 127.0
MAX_MAGNITUDE = 1e30
MIN_MAGNITUDE = 1e-30
SCALE_DTYPE = torch.bfloat16


def sanitize(x: torch.Tensor) -> torch.Tensor:
    """fp32 without the values that cannot be quantized: NaN counts as 0, magnitudes saturate at 1e30."""
    return torch.nan_to_num(x.float(), nan=0.0).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE)


@dataclass(frozen=True)
class Quantized:
    """Vectors along the last dimension as codes."""

    codes: torch.Tensor
    """[..., head_size] int8; signed with 8 bits, from 0 up with fewer"""
    scales: torch.Tensor
    """[...] bf16, the length of a step"""
    midpoints: torch.Tensor | None = None
    """[...] bf16, the middle between the ends of the vector; None with 8 bits, which are symmetric"""

    @property
    def params(self) -> tuple[torch.Tensor, ...]:
        """What belongs to a vector besides its codes."""
        return (self.scales,) if self.midpoints is None else (self.scales, self.midpoints)

    def dequantize(self, bits: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors, but for the error of their quantization."""
        scales = self.scales.to(dtype)[..., None]
        if self.midpoints is None:
            return self.codes.to(dtype) * scales
        return (self.codes.to(dtype) - num_levels(bits) / 2) * scales + self.midpoints.to(dtype)[..., None]


def num_levels(bits: int) -> int:
    """The largest code below 8 bits."""
    return 2**bits - 1


def quantize(x: torch.Tensor, bits: int = 8) -> Quantized:
    """Quantize the finite vectors along the last dimension.

    With 8 bits symmetrically, and a vector below 1e-30 everywhere becomes zeros with scale 1. With fewer bits between
    the ends of the vector, and one whose ends lie closer becomes zeros with scale 0, which means its midpoint.
    """
    x = x.float()
    if bits == 8:
        amax = x.abs().amax(dim=-1)
        scales = torch.where(amax >= MIN_MAGNITUDE, amax / INT8_MAX, 1.0).to(SCALE_DTYPE)
        return Quantized(torch.round(x / scales.float()[..., None]).to(torch.int8), scales)
    levels = num_levels(bits)
    low, high = x.amin(dim=-1), x.amax(dim=-1)
    midpoints = ((low + high) * 0.5 + 0.0).to(SCALE_DTYPE)  # no -0: which of two zeros is smaller is not defined
    middle = midpoints.float()
    half = torch.maximum(high - middle, middle - low)
    scales = torch.where(half >= MIN_MAGNITUDE, (half + half) / levels, 0.0).to(SCALE_DTYPE)
    steps = (x - middle[..., None]) / torch.where(scales > 0, scales.float(), 1.0)[..., None]
    codes = torch.round(steps + levels / 2).clamp(0, levels) * (scales > 0)[..., None]
    return Quantized(codes.to(torch.int8), scales, midpoints)

"""The quantizer of one K or V vector in plain PyTorch. `csrc/format/quantizer.h` states the same, bit for bit."""

import torch

INT8_MAX = 127.0
MAX_MAGNITUDE = 1e30
MIN_MAGNITUDE = 1e-30
SCALE_DTYPE = torch.bfloat16


def sanitize(x: torch.Tensor) -> torch.Tensor:
    """fp32 without the values that cannot be quantized: NaN counts as 0, magnitudes saturate at 1e30."""
    return torch.nan_to_num(x.float(), nan=0.0).clamp(-MAX_MAGNITUDE, MAX_MAGNITUDE)


def quantize(x: torch.Tensor, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize the finite vectors along the last dimension.

    Returns:
        codes, int8, the shape of `x`; scales, bf16, one per vector. A vector below 1e-30 everywhere becomes zeros with
        scale 1.

    Raises:
        ValueError: there is no quantizer of so many bits.
    """
    if bits != 8:
        raise ValueError(f"bits must be 8, got {bits}")
    x = x.float()
    amax = x.abs().amax(dim=-1)
    scales = torch.where(amax >= MIN_MAGNITUDE, amax / INT8_MAX, 1.0).to(SCALE_DTYPE)
    codes = torch.round(x / scales.float()[..., None])
    return codes.to(torch.int8), scales

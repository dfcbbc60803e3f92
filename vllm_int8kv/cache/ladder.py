"""The operators of the per-channel ladder (arXiv 2601.04719): one typed wrapper each. Serving never calls them."""

import torch

from vllm_int8kv.cache import library as library  # loads the operators

CPU_VARIANTS = ("column_strided", "row_major", "tiled", "simd", "vectorized")
"""The ladder on CPU: the paper's loop order, a plain loop, tiles, vectors, vectors on all threads of PyTorch."""

CUDA_VARIANTS = ("naive", "tiled", "coarsened", "vectorized", "fused")
"""The ladder on CUDA, as in the paper; `fused` also finds the scales, in one launch, and has no inverse."""


def quantize_per_channel(
    x: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    variant: str = "vectorized",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every channel of a matrix symmetrically with one scale: static caches, offline compression.

    `codes = round_half_even(x / scales)`, saturated at +-127; NaN becomes 0. The error is at most half a
    scale where `scales` come from `x`. Every variant gives the same bits.

    Args:
        x: [num_tokens, num_channels], fp32, fp16 or bf16; any token stride.
        scales: [num_channels] fp32, positive and not subnormal; None takes `max|x| / 127` per channel, where
            NaN counts as 0, magnitudes saturate at 1e30 and a channel below 1e-30 everywhere gets scale 1.
        variant: one of `CPU_VARIANTS` or `CUDA_VARIANTS`, by the device of `x`.
        out: [num_tokens, num_channels] int8, contiguous; receives the codes.

    Returns:
        codes [num_tokens, num_channels] int8 and scales [num_channels] fp32.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    compute_scales = scales is None
    if scales is None:
        scales = torch.empty(x.shape[-1:], dtype=torch.float32, device=x.device)
    torch.ops.int8kv.quantize_per_channel(x, codes, scales, compute_scales, variant)
    return codes, scales


def dequantize_per_channel(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str = "vectorized",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`codes * scales`, multiplied in fp32 and rounded half to even to `dtype`.

    Args:
        codes: [num_tokens, num_channels] int8, contiguous.
        scales: [num_channels] fp32.
        dtype: fp32, fp16 or bf16; that of `out` if there is one.
        variant: as for `quantize_per_channel`, without `fused`.
        out: [num_tokens, num_channels], contiguous; receives the result.
    """
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    torch.ops.int8kv.dequantize_per_channel(x, codes, scales, variant)
    return x

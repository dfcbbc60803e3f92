"""Matrices for the tests of the ladder: sizes off every boundary, and every special value."""

import pytest
import torch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
SHAPES = [(1, 1), (0, 5), (3, 0), (7, 130), (300, 17), (129, 64), (70, 200)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def matrix(num_tokens: int, num_channels: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Channels of very different sizes, with every special value, and NaN in the gaps between its rows."""
    x = torch.randn(num_tokens, num_channels) * torch.randn(num_channels).mul(4).exp()
    if num_tokens >= 5 and num_channels >= 8:
        x[0, 0], x[1, 1], x[2, 2], x[3, 1] = torch.nan, torch.inf, -torch.inf, torch.nan
        x[:, 3], x[:, 4], x[:, 5] = 0.0, torch.nan, 3e-31
        x[4, 6], x[4, 7] = 3e38, -1e-40
    storage = torch.full((num_tokens, num_channels + 16), torch.nan, dtype=dtype, device=device)
    return storage[:, :num_channels].copy_(x)

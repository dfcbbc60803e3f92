"""What is done to keys before they are quantized, and to queries so that `q . k` stays the same, in plain PyTorch.

K is divided by the equalizer, then rotated; Q is multiplied by the equalizer and rotated by the same matrix.
`csrc/format/rotation.h` states the same, bit for bit.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch

from vllm_int8kv.cache.quantizer import sanitize


def rotation_block(head_size: int) -> int:
    """The largest power of two, at most 256, that divides `head_size`."""
    return min(head_size & -head_size, 256)


def hadamard_rotate(x: torch.Tensor) -> torch.Tensor:
    """Multiply the last dimension by an orthonormal Hadamard matrix, in blocks of `rotation_block`.

    fp32 in, fp32 out. The order of the additions is part of the cache format: for half = 1, 2, 4, ...
    (a, b) becomes (a + b, a - b), and one multiplication by 1 / sqrt(block) comes last.
    """
    head_size = x.shape[-1]
    block = rotation_block(head_size)
    half = 1
    while half < block:
        pairs = x.reshape(*x.shape[:-1], head_size // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], dim=-2).reshape(x.shape)
        half *= 2
    return x * torch.tensor(1.0 / math.sqrt(block), dtype=torch.float32)


@dataclass(frozen=True)
class KeyTransform:
    """The transform of one layer's keys; whoever reads its cache must apply the same one to queries."""

    rotate: bool = True
    """Multiply by a Hadamard matrix, which spreads outlier channels over the head."""
    equalizer: torch.Tensor | None = None
    """[num_kv_heads, head_size] fp32: K is divided by it and Q multiplied."""

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return self if self.equalizer is None else replace(self, equalizer=self.equalizer.to(device))

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        """Keys `[..., num_kv_heads, head_size]` as they are quantized, fp32."""
        key = sanitize(key)
        if self.equalizer is not None:
            key = sanitize(key / self.equalizer)
        return hadamard_rotate(key) if self.rotate else key

    def undo_keys(self, key: torch.Tensor) -> torch.Tensor:
        """What `keys` was given, but for the error of the quantization between the two; fp32."""
        if self.rotate:  # is its own inverse
            key = hadamard_rotate(key)
        return key if self.equalizer is None else key * self.equalizer

    def queries(self, query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Queries `[..., num_heads, head_size]` as they meet transformed keys, fp32."""
        query = query.float()
        if self.equalizer is not None:
            num_queries_per_kv = query.shape[-2] // num_kv_heads
            query = query * self.equalizer.repeat_interleave(num_queries_per_kv, dim=0)
        return hadamard_rotate(query) if self.rotate else query

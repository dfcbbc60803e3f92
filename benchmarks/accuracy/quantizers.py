"""Quantizers in plain PyTorch: what each gives back of a tensor. `schemes.py` says which of them K and V go through.

Tensors are [num_tokens, num_kv_heads, head_size] fp32, keys after RoPE. The quantizer of this project's cache is not
among them: it is `vllm_int8kv.cache.formats`.
"""

import torch

from vllm_int8kv.cache.key_transform import hadamard_rotate, rotation_block
from vllm_int8kv.cache.quantizer import num_levels
from vllm_int8kv.evaluation.tuning.schemes import through_fp8

GROUP = 32
SMALLEST_SCALE = 1e-30
"""In place of 0, so that a vector whose elements are all equal divides by something."""


def per_vector_fp32(x: torch.Tensor) -> torch.Tensor:
    """Symmetric, one fp32 scale per vector: vLLM's int8_per_token_head."""
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_SCALE) / 127
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
    return through_fp8(x / scale) * scale


def random_signs(head_size: int) -> torch.Tensor:
    """The signs [head_size] that vLLM's int4_per_token_head multiplies by before it rotates; it fixes their seed."""
    block = rotation_block(head_size)
    generator = torch.Generator().manual_seed(0x9E3779B9)
    signs = 2 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1
    return signs.repeat(head_size // block)


def int4_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """vLLM's: rotated with random signs, an fp32 scale per vector, in whose last 4 bits lies an integer zero point."""
    signs = random_signs(x.shape[-1])
    rotated = hadamard_rotate(x * signs)
    low, high = rotated.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / num_levels(4)).clamp_min(1e-6)
    zero = torch.round(-low / scales).clamp(0, num_levels(4))
    codes = torch.round(rotated / scales + zero).clamp(0, num_levels(4))
    stored = ((scales.view(torch.int32) & -16) | zero.int()).view(torch.float32)
    return hadamard_rotate((codes - zero) * stored) * signs


def kivi_keys(x: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 scale and minimum per channel and 32 tokens, as KIVI stores keys but for the newest, which it leaves."""
    return torch.cat([_between_ends(tokens, bits, dim=0) for tokens in x.split(GROUP)])


def kivi_values(x: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 scale and minimum per token and 32 channels, as KIVI stores values but for the newest."""
    return _between_ends(x.unflatten(-1, (-1, GROUP)), bits, dim=-1).flatten(-2)


def _between_ends(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    low, high = x.aminmax(dim=dim, keepdim=True)
    scales, low = ((high - low) / num_levels(bits)).half().float(), low.half().float()
    codes = torch.round((x - low) / scales.clamp_min(SMALLEST_SCALE)).clamp(0, num_levels(bits))
    return codes * scales + low


def without_midpoint(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A bf16 scale per vector and 2^bits levels on both sides of zero, so that no code is wasted."""
    levels = num_levels(bits)
    scales = (x.abs().amax(dim=-1, keepdim=True) * 2 / levels).bfloat16().float().clamp_min(SMALLEST_SCALE)
    codes = torch.round(x / scales + levels / 2).clamp(0, levels)
    return (codes - levels / 2) * scales


def with_bf16_minimum(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A bf16 scale and the bf16 minimum per vector in place of its midpoint, which is nearer to zero, so exacter."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.bfloat16().float()
    scales = ((high - low) / num_levels(bits)).bfloat16().float().clamp_min(SMALLEST_SCALE)
    return torch.round((x - low) / scales).clamp(0, num_levels(bits)) * scales + low

"""The bytes of the INT8 KV cache: the only place that knows them, beside `csrc/params.h`.

One layer's cache is an int8 tensor `[num_blocks, num_kv_heads, block_size, content_bytes]`. The bytes
of one (block, KV head) pair, a chunk, are contiguous and hold four planes:

    K codes [block_size * head_size] | V codes [block_size * head_size]
    | K scales [block_size] bf16     | V scales [block_size] bf16

    K codes  [block_size / 16][head_size / 2][16 slots][2 dims]
    V codes  [head_size / 16][block_size / 2][16 dims][2 slots]

so `content_bytes = 2 * head_size + 4` per slot, and every plane starts on a 16-byte boundary. The last
dimension of the tensor is therefore a count of bytes, not an index with a meaning.
"""

from dataclasses import dataclass

import torch

SLOT_GROUP = 16
"""`block_size` and `head_size` are multiples of this."""

SUPPORTED_HEAD_SIZES = (*range(32, 257, 16), 512)
SCALE_DTYPE = torch.bfloat16


def check_head_size(head_size: int) -> None:
    """Raise ValueError unless the kernels have `head_size`."""
    if head_size not in SUPPORTED_HEAD_SIZES:
        raise ValueError(f"head_size {head_size} is not supported; supported: 32 to 256 in steps of 16, and 512")


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a positive multiple of 16."""
    if block_size <= 0 or block_size % SLOT_GROUP:
        raise ValueError(f"block_size must be a positive multiple of {SLOT_GROUP}, got {block_size}")


def content_bytes(head_size: int) -> int:
    """Bytes per slot and KV head: two codes per dim and two bf16 scales."""
    return 2 * head_size + 2 * SCALE_DTYPE.itemsize


def allocate(
    num_blocks: int, num_kv_heads: int, block_size: int, head_size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Return an empty (all-zero) cache `[num_blocks, num_kv_heads, block_size, content_bytes]` int8."""
    check_head_size(head_size)
    check_block_size(block_size)
    shape = (num_blocks, num_kv_heads, block_size, content_bytes(head_size))
    return torch.zeros(shape, dtype=torch.int8, device=device)


def head_size_of(kv_cache: torch.Tensor) -> int:
    """The head size of a cache made by `allocate` or handed over by vLLM."""
    if kv_cache.dim() != 4 or kv_cache.dtype != torch.int8:
        raise ValueError(
            "kv_cache must be int8 [num_blocks, num_kv_heads, block_size, content_bytes], "
            f"got {kv_cache.dtype} {list(kv_cache.shape)}"
        )
    return (kv_cache.shape[3] - content_bytes(0)) // 2


@dataclass(frozen=True)
class Planes:
    """The four planes of a cache in logical order; copies, not views, of the cache's bytes."""

    k_codes: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, head_size] int8"""
    v_codes: torch.Tensor
    """same shape as `k_codes`"""
    k_scales: torch.Tensor
    """[num_blocks, num_kv_heads, block_size] bf16"""
    v_scales: torch.Tensor
    """same shape as `k_scales`"""


def unpack(kv_cache: torch.Tensor) -> Planes:
    """Take a cache apart into its planes, undoing the interleaving."""
    head_size = head_size_of(kv_cache)
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    lead = (num_blocks, num_kv_heads)
    chunks = kv_cache.reshape(*lead, block_size * content_bytes(head_size))
    codes, scales = block_size * head_size, block_size * SCALE_DTYPE.itemsize
    k_codes, v_codes, k_scales, v_scales = chunks.split([codes, codes, scales, scales], dim=-1)
    k_codes = k_codes.reshape(*lead, block_size // 16, head_size // 2, 16, 2).permute(0, 1, 2, 4, 3, 5)
    v_codes = v_codes.reshape(*lead, head_size // 16, block_size // 2, 16, 2).permute(0, 1, 3, 5, 2, 4)
    return Planes(
        k_codes=k_codes.reshape(*lead, block_size, head_size),
        v_codes=v_codes.reshape(*lead, block_size, head_size),
        k_scales=k_scales.contiguous().view(SCALE_DTYPE),
        v_scales=v_scales.contiguous().view(SCALE_DTYPE),
    )


def pack(planes: Planes) -> torch.Tensor:
    """Put planes together into a cache: the inverse of `unpack`."""
    num_blocks, num_kv_heads, block_size, head_size = planes.k_codes.shape
    lead = (num_blocks, num_kv_heads)
    k_codes = planes.k_codes.reshape(*lead, block_size // 16, 16, head_size // 2, 2).permute(0, 1, 2, 4, 3, 5)
    v_codes = planes.v_codes.reshape(*lead, block_size // 2, 2, head_size // 16, 16).permute(0, 1, 4, 2, 5, 3)
    parts = [
        k_codes.reshape(*lead, block_size * head_size),
        v_codes.reshape(*lead, block_size * head_size),
        planes.k_scales.contiguous().view(torch.int8),
        planes.v_scales.contiguous().view(torch.int8),
    ]
    return torch.cat(parts, dim=-1).reshape(*lead, block_size, content_bytes(head_size))

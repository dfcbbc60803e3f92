"""The cache formats: how keys and values of one layer lie in its cache. `csrc/format/cache_format.h` states the same.

One layer's cache is an int8 tensor `[num_blocks, num_kv_heads, block_size, content_bytes]`. The bytes of one
(block, KV head) pair, a chunk, are contiguous and hold four planes, each of which starts on a 16-byte boundary:

    K codes | V codes | K scales [block_size] bf16 | V scales [block_size] bf16

The last dimension of the tensor is therefore a count of bytes per slot, not an index with a meaning. Which codes a
plane holds, and in which order, is the layer's `CacheFormat`. It is passed by name, never inferred from sizes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_int8kv.cache import quantizer

SLOT_GROUP = 16
"""`block_size` and `head_size` are multiples of this."""

SUPPORTED_HEAD_SIZES = (*range(32, 257, 16), 512)
HEAD_SIZES_TEXT = "32 to 256 in steps of 16, and 512"
SCALE_DTYPE = quantizer.SCALE_DTYPE


def check_head_size(head_size: int) -> None:
    """Raise ValueError unless the kernels have `head_size`."""
    if head_size not in SUPPORTED_HEAD_SIZES:
        raise ValueError(f"head_size {head_size} is not supported; supported: {HEAD_SIZES_TEXT}")


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a positive multiple of 16."""
    if block_size <= 0 or block_size % SLOT_GROUP:
        raise ValueError(f"block_size must be a positive multiple of {SLOT_GROUP}, got {block_size}")


def native_content_bytes(head_size: int, itemsize: int) -> int:
    """Bytes per slot and KV head of an unquantized cache, whose elements have `itemsize` bytes."""
    return 2 * head_size * itemsize


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


class Codes(ABC):
    """The trait of a plane of codes: how many bits a code has, and where it lies."""

    bits: int

    @abstractmethod
    def pack_k(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes `[..., block_size * head_size * bits / 8]` int8 of K codes `[..., block_size, head_size]`."""

    @abstractmethod
    def unpack_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `pack_k`."""

    @abstractmethod
    def pack_v(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes of V codes, as `pack_k`."""

    @abstractmethod
    def unpack_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `pack_v`."""


class Int8Codes(Codes):
    """One signed byte per code, interleaved in lines of 32 bytes: two steps of a dot product for 16 outputs.

    K codes  [block_size / 16][head_size / 2][16 slots][2 dims]
    V codes  [head_size / 16][block_size / 2][16 dims][2 slots]
    """

    bits = 8

    def pack_k(self, codes: torch.Tensor) -> torch.Tensor:
        *lead, block_size, head_size = codes.shape
        lines = codes.reshape(*lead, block_size // 16, 16, head_size // 2, 2).transpose(-3, -2)
        return lines.reshape(*lead, block_size * head_size)

    def unpack_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        lead = plane.shape[:-1]
        lines = plane.reshape(*lead, block_size // 16, head_size // 2, 16, 2).transpose(-3, -2)
        return lines.reshape(*lead, block_size, head_size)

    def pack_v(self, codes: torch.Tensor) -> torch.Tensor:
        *lead, block_size, head_size = codes.shape
        lines = codes.reshape(*lead, block_size // 2, 2, head_size // 16, 16)
        # [slots / 2][2 slots][dims / 16][16 dims] becomes [dims / 16][slots / 2][16 dims][2 slots].
        return lines.movedim(-3, -1).transpose(-4, -3).reshape(*lead, block_size * head_size)

    def unpack_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        lead = plane.shape[:-1]
        lines = plane.reshape(*lead, head_size // 16, block_size // 2, 16, 2)
        return lines.transpose(-4, -3).movedim(-1, -3).reshape(*lead, block_size, head_size)


CODES: dict[int, Codes] = {codes.bits: codes for codes in (Int8Codes(),)}
"""By bits per code."""


@dataclass(frozen=True)
class CacheFormat:
    """Bits of the codes of K and V; each (slot, KV head) vector has a scale of its own."""

    name: str
    """what users, policies and operators call it"""
    k_bits: int
    v_bits: int

    def content_bytes(self, head_size: int) -> int:
        """Bytes per slot and KV head, scales included."""
        return (self.k_bits + self.v_bits) * head_size // 8 + 2 * SCALE_DTYPE.itemsize

    def allocate(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_size: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Return an empty (all-zero) cache `[num_blocks, num_kv_heads, block_size, content_bytes]` int8."""
        check_head_size(head_size)
        check_block_size(block_size)
        shape = (num_blocks, num_kv_heads, block_size, self.content_bytes(head_size))
        return torch.zeros(shape, dtype=torch.int8, device=device)

    def head_size_of(self, kv_cache: torch.Tensor) -> int:
        """The head size whose cache in this format has as many bytes per slot as `kv_cache`.

        Raises:
            ValueError: `kv_cache` is no cache of this format.
        """
        if kv_cache.dim() != 4 or kv_cache.dtype != torch.int8:
            raise ValueError(
                "kv_cache must be int8 [num_blocks, num_kv_heads, block_size, content_bytes], "
                f"got {kv_cache.dtype} {list(kv_cache.shape)}"
            )
        for head_size in SUPPORTED_HEAD_SIZES:
            if self.content_bytes(head_size) == kv_cache.shape[3]:
                return head_size
        raise ValueError(f"kv_cache holds {kv_cache.shape[3]} bytes per slot, which is {self.name} of no head size")

    def unpack(self, kv_cache: torch.Tensor) -> Planes:
        """Take a cache apart into its planes, undoing the interleaving."""
        head_size = self.head_size_of(kv_cache)
        num_blocks, num_kv_heads, block_size, content_bytes = kv_cache.shape
        chunks = kv_cache.reshape(num_blocks, num_kv_heads, block_size * content_bytes)
        codes, scales = block_size * head_size, block_size * SCALE_DTYPE.itemsize
        sizes = [codes * self.k_bits // 8, codes * self.v_bits // 8, scales, scales]
        k_codes, v_codes, k_scales, v_scales = chunks.split(sizes, dim=-1)
        return Planes(
            k_codes=CODES[self.k_bits].unpack_k(k_codes, block_size, head_size),
            v_codes=CODES[self.v_bits].unpack_v(v_codes, block_size, head_size),
            k_scales=k_scales.contiguous().view(SCALE_DTYPE),
            v_scales=v_scales.contiguous().view(SCALE_DTYPE),
        )

    def pack(self, planes: Planes) -> torch.Tensor:
        """Put planes together into a cache: the inverse of `unpack`."""
        num_blocks, num_kv_heads, block_size, head_size = planes.k_codes.shape
        parts = [
            CODES[self.k_bits].pack_k(planes.k_codes),
            CODES[self.v_bits].pack_v(planes.v_codes),
            planes.k_scales.contiguous().view(torch.int8),
            planes.v_scales.contiguous().view(torch.int8),
        ]
        return torch.cat(parts, dim=-1).reshape(num_blocks, num_kv_heads, block_size, self.content_bytes(head_size))

    def quantize_k(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of finite, transformed keys `[..., head_size]`."""
        return quantizer.quantize(key, self.k_bits)

    def quantize_v(self, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of finite values `[..., head_size]`."""
        return quantizer.quantize(value, self.v_bits)

    def round_trip_k(self, key: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of finite, transformed keys, fp32."""
        codes, scales = self.quantize_k(key)
        return codes.float() * scales.float()[..., None]

    def round_trip_v(self, value: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of finite values, fp32."""
        codes, scales = self.quantize_v(value)
        return codes.float() * scales.float()[..., None]


K8V8 = CacheFormat("k8v8", k_bits=8, v_bits=8)

FORMATS: dict[str, CacheFormat] = {cache_format.name: cache_format for cache_format in (K8V8,)}
"""By name, what layers may have."""

"""The cache formats: how keys and values of one layer lie in its cache. `csrc/format/cache_format.h` states the same.

One layer's cache is an int8 tensor `[num_blocks, num_kv_heads, block_size, content_bytes]`. The bytes of one
(block, KV head) pair, a chunk, are contiguous and hold planes that each start on a 16-byte boundary:

    K codes | V codes | K scales [block_size] bf16 | K midpoints | V scales [block_size] bf16 | V midpoints

Codes of 8 bits have no midpoints. The last dimension of the tensor is therefore a count of bytes per slot, not an index
with a meaning. Which codes a plane holds, and in which order, is the layer's `CacheFormat`. It is passed by name, never
inferred from sizes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch

from vllm_int8kv.cache import quantizer
from vllm_int8kv.cache.key_transform import hadamard_rotate
from vllm_int8kv.cache.quantizer import Quantized, sanitize

SLOT_GROUP = 16
"""`block_size` and `head_size` are multiples of this."""

SUPPORTED_HEAD_SIZES = (*range(32, 257, 16), 512)
HEAD_SIZES_TEXT = "32 to 256 in steps of 16, and 512"
MAX_CUDA_HEAD_SIZE = 128
"""The largest head size that the CUDA kernels have for formats other than k8v8."""
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
    """The planes of a cache in logical order; copies, not views, of the cache's bytes."""

    k_codes: torch.Tensor
    """[num_blocks, num_kv_heads, block_size, head_size] int8"""
    v_codes: torch.Tensor
    """same shape as `k_codes`"""
    k_scales: torch.Tensor
    """[num_blocks, num_kv_heads, block_size] bf16"""
    v_scales: torch.Tensor
    """same shape as `k_scales`"""
    k_midpoints: torch.Tensor | None = None
    """same shape as `k_scales`; None with 8 bits"""
    v_midpoints: torch.Tensor | None = None

    @classmethod
    def of(cls, keys: Quantized, values: Quantized) -> Self:
        return cls(keys.codes, values.codes, keys.scales, values.scales, keys.midpoints, values.midpoints)

    @property
    def keys(self) -> Quantized:
        return Quantized(self.k_codes, self.k_scales, self.k_midpoints)

    @property
    def values(self) -> Quantized:
        return Quantized(self.v_codes, self.v_scales, self.v_midpoints)


@dataclass(frozen=True)
class Chunks:
    """The planes of the chunks of a cache as they lie, each `[num_blocks, num_kv_heads, ...]`."""

    k_codes: torch.Tensor
    """[..., k_bytes] int8"""
    v_codes: torch.Tensor
    """[..., v_bytes] int8"""
    k_params: tuple[torch.Tensor, ...]
    """[..., block_size] bf16: scales, and below 8 bits midpoints"""
    v_params: tuple[torch.Tensor, ...]


K_RUN = 128
"""Bytes of lines of 16 slots and 8 dims, which lie on top of those of the next 8 dims."""


@dataclass(frozen=True)
class BitPlane:
    """8, 4, 2 or 1 bits of every code: lines on top of each other, as many as fit into a byte.

    K  [block_size / 16][head_size / (8 fields)][8 dims / 2][16 slots][2 dims], field f: 8 dims on
    V  [head_size / (16 fields)][block_size / 2][16 dims][2 slots], field f: 16 dims on

    Head sizes are padded to whole lines with codes of 0.
    """

    bits: int

    @property
    def num_fields(self) -> int:
        return 8 // self.bits

    @property
    def mask(self) -> int:
        return 2**self.bits - 1

    def k_bytes(self, block_size: int, head_size: int) -> int:
        return block_size * _round_up(head_size, 8 * self.num_fields) // self.num_fields

    def v_bytes(self, block_size: int, head_size: int) -> int:
        return block_size * _round_up(head_size, 16 * self.num_fields) // self.num_fields

    def join(self, codes: torch.Tensor, run: int) -> torch.Tensor:
        """Bytes of codes in the last dimension, uint8, of which every so many lie on top of the next so many."""
        if padding := -codes.shape[-1] % (run * self.num_fields):
            codes = torch.nn.functional.pad(codes, (0, padding))
        first, *others = codes.unflatten(-1, (-1, self.num_fields, run)).unbind(dim=-2)
        joined = first & self.mask
        for number, field in enumerate(others, start=1):
            joined |= (field & self.mask) << number * self.bits
        return joined.flatten(-2)

    def split(self, plane: torch.Tensor, run: int) -> torch.Tensor:
        """The inverse of `join`, with what was padded."""
        fields = plane.view(torch.uint8).unflatten(-1, (-1, run))
        parts = [fields >> number * self.bits & self.mask for number in range(self.num_fields)]
        return torch.stack(parts, dim=-2).flatten(-3)


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


class Codes(ABC):
    """The trait of the codes of K or V: how many bits a code has, and where it lies.

    Whatever their bits, codes are first put into lines of 32 bytes, one byte each, which hold two steps of a dot
    product for 16 outputs:

        K lines  [block_size / 16, head_size / 2, 16 slots, 2 dims]
        V lines  [head_size / 16, block_size / 2, 16 dims, 2 slots]

    With 8 bits these are the plane.
    """

    bits: int
    planes: tuple[BitPlane, ...]
    """of the bits of a code, the lowest ones first"""

    def k_bytes(self, block_size: int, head_size: int) -> int:
        """Bytes of the K codes of a block."""
        return sum(plane.k_bytes(block_size, head_size) for plane in self.planes)

    def v_bytes(self, block_size: int, head_size: int) -> int:
        """Bytes of the V codes of a block."""
        return sum(plane.v_bytes(block_size, head_size) for plane in self.planes)

    @abstractmethod
    def join_k(self, lines: torch.Tensor) -> torch.Tensor:
        """Bytes `[..., k_bytes]` int8 of K lines `[..., block_size / 16, head_size / 2, 16, 2]` int8."""

    @abstractmethod
    def split_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `join_k`."""

    @abstractmethod
    def join_v(self, lines: torch.Tensor) -> torch.Tensor:
        """Bytes `[..., v_bytes]` int8 of V lines `[..., head_size / 16, block_size / 2, 16, 2]` int8."""

    @abstractmethod
    def split_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `join_v`."""

    def pack_k(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes `[..., k_bytes]` int8 of K codes `[..., block_size, head_size]` int8."""
        lines = codes.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 16))
        return self.join_k(lines.transpose(-3, -2).contiguous())

    def unpack_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `pack_k`."""
        return self.split_k(plane, block_size, head_size).transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def pack_v(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes of V codes, as `pack_k`."""
        lines = codes.unflatten(-1, (-1, 16)).unflatten(-3, (-1, 2))
        return self.join_v(lines.movedim(-2, -4).transpose(-2, -1).contiguous())

    def unpack_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        """The inverse of `pack_v`."""
        lines = self.split_v(plane, block_size, head_size)
        return lines.transpose(-2, -1).movedim(-4, -2).flatten(-2).flatten(-3, -2)

    @property
    def num_params(self) -> int:
        """Scale, and below 8 bits midpoint, of a vector."""
        return 1 if self.bits == 8 else 2

    @property
    def param_bytes(self) -> int:
        """Bytes per slot of those."""
        return self.num_params * SCALE_DTYPE.itemsize


class Int8Codes(Codes):
    """One signed byte per code."""

    bits = 8
    planes = (BitPlane(8),)

    def join_k(self, lines: torch.Tensor) -> torch.Tensor:
        return lines.flatten(-4)

    def split_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        return plane.unflatten(-1, (block_size // 16, head_size // 2, 16, 2))

    join_v = join_k

    def split_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        return plane.unflatten(-1, (head_size // 16, block_size // 2, 16, 2))


class LowBitCodes(Codes):
    """Unsigned codes of six bits or fewer: the lower four bits in one plane, the others in the next."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.planes = tuple(BitPlane(b) for b in ((bits,) if bits <= 4 else (4, bits - 4)))

    def join_k(self, lines: torch.Tensor) -> torch.Tensor:
        groups = lines.flatten(-3).view(torch.uint8)  # of 16 slots
        parts = [plane.join(groups >> 4 * number, K_RUN).flatten(-2) for number, plane in enumerate(self.planes)]
        return torch.cat(parts, dim=-1).view(torch.int8)

    def split_k(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        sizes = [part.k_bytes(block_size, head_size) for part in self.planes]
        groups = (own.unflatten(-1, (block_size // 16, -1)) for own in plane.split(sizes, dim=-1))
        parts = [part.split(own, K_RUN)[..., : 16 * head_size] for part, own in zip(self.planes, groups, strict=True)]
        return _whole(parts).unflatten(-1, (head_size // 2, 16, 2))

    def join_v(self, lines: torch.Tensor) -> torch.Tensor:
        codes, run = lines.flatten(-4).view(torch.uint8), 32 * lines.shape[-3]
        parts = [plane.join(codes >> 4 * number, run) for number, plane in enumerate(self.planes)]
        return torch.cat(parts, dim=-1).view(torch.int8)

    def split_v(self, plane: torch.Tensor, block_size: int, head_size: int) -> torch.Tensor:
        split = plane.split([part.v_bytes(block_size, head_size) for part in self.planes], dim=-1)
        parts = [
            part.split(own, 16 * block_size)[..., : block_size * head_size]
            for part, own in zip(self.planes, split, strict=True)
        ]
        return _whole(parts).unflatten(-1, (head_size // 16, block_size // 2, 16, 2))


def _whole(parts: list[torch.Tensor]) -> torch.Tensor:
    """Codes of their lower four bits, and of those above if there are any."""
    return (parts[0] if len(parts) == 1 else parts[0] | parts[1] << 4).view(torch.int8)


CODES: dict[int, Codes] = {8: Int8Codes()} | {bits: LowBitCodes(bits) for bits in (6, 5, 4, 2)}
"""By bits per code, most first."""


@dataclass(frozen=True)
class CacheFormat:
    """Bits of the codes of K and V; each (slot, KV head) vector has a scale of its own, and below 8 bits a midpoint."""

    name: str
    """what users, policies and operators call it"""
    k_bits: int
    v_bits: int

    @property
    def rotates_values(self) -> bool:
        """Whether values are rotated before they are quantized, as keys are, and outputs rotated back."""
        return self.v_bits < 8

    def has_cuda_kernels(self, head_size: int) -> bool:
        """Whether the CUDA kernels have this format for a head size that the CPU kernels have."""
        return (self.k_bits, self.v_bits) == (8, 8) or head_size <= MAX_CUDA_HEAD_SIZE

    def content_bytes(self, head_size: int) -> int:
        """Bytes per slot and KV head, scales and midpoints included."""
        k_codes, v_codes = CODES[self.k_bits], CODES[self.v_bits]
        codes = k_codes.k_bytes(SLOT_GROUP, head_size) + v_codes.v_bytes(SLOT_GROUP, head_size)
        return codes // SLOT_GROUP + k_codes.param_bytes + v_codes.param_bytes

    def allocate(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_size: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """Return an empty (all-zero) cache `[num_blocks, num_kv_heads, block_size, content_bytes]` int8."""
        check_head_size(head_size)
        check_block_size(block_size)
        shape = (num_blocks, num_kv_heads, block_size, self.content_bytes(head_size))
        return torch.zeros(shape, dtype=torch.int8, device=device)

    def head_size_of(self, kv_cache: torch.Tensor) -> int:
        """The largest head size whose cache in this format has as many bytes per slot as `kv_cache`.

        Raises:
            ValueError: `kv_cache` is no cache of this format.
        """
        if kv_cache.dim() != 4 or kv_cache.dtype != torch.int8:
            raise ValueError(
                "kv_cache must be int8 [num_blocks, num_kv_heads, block_size, content_bytes], "
                f"got {kv_cache.dtype} {list(kv_cache.shape)}"
            )
        for head_size in reversed(SUPPORTED_HEAD_SIZES):
            if self.content_bytes(head_size) == kv_cache.shape[3]:
                return head_size
        raise ValueError(f"kv_cache holds {kv_cache.shape[3]} bytes per slot, which is {self.name} of no head size")

    def split(self, kv_cache: torch.Tensor, head_size: int) -> Chunks:
        """Take a cache apart into the planes of its chunks, without copies."""
        block_size = kv_cache.shape[2]
        k_codes, v_codes = CODES[self.k_bits], CODES[self.v_bits]
        sizes = [k_codes.k_bytes(block_size, head_size), v_codes.v_bytes(block_size, head_size)]
        sizes += [block_size * k_codes.param_bytes, block_size * v_codes.param_bytes]
        k_plane, v_plane, *params = kv_cache.flatten(2).split(sizes, dim=-1)
        vector = block_size * SCALE_DTYPE.itemsize
        k_params, v_params = (tuple(x.contiguous().view(SCALE_DTYPE) for x in p.split(vector, dim=-1)) for p in params)
        return Chunks(k_plane, v_plane, k_params, v_params)

    def join(self, chunks: Chunks) -> torch.Tensor:
        """Put planes together into a cache: the inverse of `split`."""
        block_size = chunks.k_params[0].shape[-1]
        params = (param.contiguous().view(torch.int8) for param in (*chunks.k_params, *chunks.v_params))
        joined = torch.cat([chunks.k_codes, chunks.v_codes, *params], dim=-1)
        return joined.unflatten(-1, (block_size, -1))

    def unpack(self, kv_cache: torch.Tensor, head_size: int | None = None) -> Planes:
        """Take a cache apart into its planes, undoing the interleaving.

        Args:
            head_size: needed where padding gives several head sizes the same number of bytes.
        """
        head_size = self.head_size_of(kv_cache) if head_size is None else head_size
        block_size, chunks = kv_cache.shape[2], self.split(kv_cache, head_size)
        keys = CODES[self.k_bits].unpack_k(chunks.k_codes, block_size, head_size)
        values = CODES[self.v_bits].unpack_v(chunks.v_codes, block_size, head_size)
        return Planes.of(Quantized(keys, *chunks.k_params), Quantized(values, *chunks.v_params))

    def pack(self, planes: Planes) -> torch.Tensor:
        """Put planes together into a cache: the inverse of `unpack`."""
        keys, values = CODES[self.k_bits].pack_k(planes.k_codes), CODES[self.v_bits].pack_v(planes.v_codes)
        return self.join(Chunks(keys, values, planes.keys.params, planes.values.params))

    def transform_values(self, value: torch.Tensor) -> torch.Tensor:
        """Values `[..., head_size]` as they are quantized, fp32."""
        value = sanitize(value)
        return hadamard_rotate(value) if self.rotates_values else value

    def undo_values(self, value: torch.Tensor) -> torch.Tensor:
        """What `transform_values` was given, of values or of sums of values."""
        return hadamard_rotate(value) if self.rotates_values else value  # is its own inverse

    def quantize_k(self, key: torch.Tensor) -> Quantized:
        """Finite, transformed keys `[..., head_size]` as codes."""
        return quantizer.quantize(key, self.k_bits)

    def quantize_v(self, value: torch.Tensor) -> Quantized:
        """Finite, transformed values `[..., head_size]` as codes."""
        return quantizer.quantize(value, self.v_bits)

    def round_trip_k(self, key: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of finite, transformed keys, fp32."""
        return self.quantize_k(key).dequantize(self.k_bits)

    def round_trip_v(self, value: torch.Tensor) -> torch.Tensor:
        """What the cache gives back of values, fp32."""
        return self.undo_values(self.quantize_v(self.transform_values(value)).dequantize(self.v_bits))


FORMATS: dict[str, CacheFormat] = {
    f"k{k}v{v}": CacheFormat(f"k{k}v{v}", k_bits=k, v_bits=v) for k in CODES for v in CODES
}
"""By name, what layers may have."""

K8V8 = FORMATS["k8v8"]


def check_format(name: str, what: str) -> None:
    """Raise ValueError unless a cache format is called so; `what` says where the name was given."""
    if name not in FORMATS:
        raise ValueError(f"{what} must be one of {', '.join(FORMATS)}, got {name!r}")

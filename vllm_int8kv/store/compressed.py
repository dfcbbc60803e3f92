"""What `+zstd` does to the payloads of another codec: fewer bytes, and nothing is lost."""

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import zstandard

from vllm_int8kv.cache.formats import CacheFormat, Planes
from vllm_int8kv.cache.quantizer import SCALE_DTYPE, Quantized
from vllm_int8kv.store import entropy
from vllm_int8kv.store.codecs import Codec, Exact, PageCodec, Payload, SplitCodec, read_integers, without_format
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.pages import PagedLayer

ONE = 0x3F80
"""The bits of 1.0 in bf16."""


class Compressed(Codec):
    """Another codec's payloads through zstandard.

    Args:
        itemsize: of the elements of a payload. The bytes of floats are compressed by their place: those of mantissas
            are random, those of exponents are not.
    """

    def __init__(self, inner: Codec, itemsize: int = 1) -> None:
        super().__init__(inner.layers)
        self._inner = inner
        self._sizes = struct.Struct(f"<{itemsize}I")

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        compressor = zstandard.ZstdCompressor(compression_params=entropy.COMPRESSION)
        itemsize = self._sizes.size // 4
        payloads = []
        for payload in self._inner.encode(pages):
            places = np.frombuffer(payload, np.uint8).reshape(-1, itemsize).T
            frames = [compressor.compress(np.ascontiguousarray(place)) for place in places]
            payloads.append(b"".join([self._sizes.pack(*map(len, frames)), *frames]))
        return payloads

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        return self._inner.decode([self._decompressed(memoryview(payload)) for payload in payloads])

    def _decompressed(self, payload: memoryview) -> memoryview:
        decompressor = zstandard.ZstdDecompressor()
        at, places = self._sizes.size, []
        try:
            for size in self._sizes.unpack_from(payload):
                frame = decompressor.decompress(payload[at : at + size], allow_extra_data=False)
                places.append(np.frombuffer(frame, np.uint8))
                at += size
            whole = np.stack(places, axis=1)
        except entropy.ERRORS as error:
            raise BadFile(f"its payload cannot be decompressed ({error})") from None
        if at != len(payload):
            raise BadFile(f"its payload has {len(payload)} bytes, expected {at}")
        return memoryview(whole.reshape(-1))


class CompressedPages(SplitCodec):
    """Pages as another codec lays them out, as integers by channel, entropy-coded.

    The channels of a layer are those of K of all heads, then what each head's K has of scales and midpoints, then the
    same of V.

    Args:
        itemsize: of the elements of other caches.
    """

    def __init__(self, inner: PageCodec, itemsize: int) -> None:
        super().__init__(inner.layers, Compressed(Exact(without_format(inner.layers)), itemsize))
        self._inner = inner
        self._formats = [inner.stored_format(layer) for layer in self._ours]
        self._widths = [
            layer.num_kv_heads * width
            for layer, stored in zip(self._ours, self._formats, strict=True)
            for width in _widths(stored, layer.head_size)
        ]

    def encode_ours(self, pages: Sequence[torch.Tensor]) -> list[bytes]:
        channels: list[torch.Tensor] = []
        for layer, stored, own in zip(self._ours, self._formats, pages, strict=True):
            rows = self._inner.encode_layer(layer, own)
            planes = stored.unpack(rows.view(len(rows), *_lead(layer), -1), layer.head_size)
            for side in (planes.keys, planes.values):
                params = [_to_integers(param) for param in _params(side)]
                channels += [side.codes.transpose(2, 3).flatten(1, 2).int(), *params]
        return [entropy.encode(block) for block in torch.cat(channels, dim=1).numpy()]

    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        num_channels = sum(self._widths)
        integers, rests = zip(
            *(read_integers(payload, num_channels, self._block_size) for payload in payloads), strict=True
        )
        channels = iter(torch.from_numpy(np.stack(integers)).split(self._widths, dim=1))
        pages = []
        for layer, stored in zip(self._ours, self._formats, strict=True):
            sides = []
            for has_midpoints in (stored.k_bits < 8, stored.v_bits < 8):
                codes = next(channels).to(torch.int8).view(-1, layer.num_kv_heads, layer.head_size, self._block_size)
                params = [_from_integers(next(channels)) for _ in range(1 + has_midpoints)]
                sides.append(Quantized(codes.transpose(2, 3), *params))
            rows = stored.pack(Planes.of(*sides)).flatten(1).view(torch.uint8)
            pages.append(self._inner.decode_layer(layer, rows))
        return pages, rests


def _lead(layer: PagedLayer) -> tuple[int, int]:
    return layer.num_kv_heads, layer.block_size


def _widths(stored: CacheFormat, head_size: int) -> list[int]:
    """Integers of a (token, KV head) pair, in the order of their channels."""
    return [width for bits in (stored.k_bits, stored.v_bits) for width in (head_size, *[1] * (1 if bits == 8 else 2))]


def _params(side: Quantized) -> list[torch.Tensor]:
    return [side.scales] if side.midpoints is None else [side.scales, side.midpoints]


def _to_integers(params: torch.Tensor) -> torch.Tensor:
    """The bits of bf16 as int32 that are near for numbers of like magnitude: the sign is the last of them, 1.0 is 0."""
    bits = params.contiguous().view(torch.int16).int() & 0xFFFF
    return ((bits & 0x7FFF) << 1 | bits >> 15) - 2 * ONE


def _from_integers(integers: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_integers`."""
    bits = integers.int() + 2 * ONE
    return (bits >> 1 | (bits & 1) << 15).to(torch.int16).view(SCALE_DTYPE)

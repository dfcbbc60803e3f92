"""What `+zstd` does to the payloads of another codec: fewer bytes, and nothing is lost."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import zstandard

from vllm_int8kv.cache.formats import CODES, SCALE_DTYPE, CacheFormat
from vllm_int8kv.store import entropy
from vllm_int8kv.store.channels import pack_channels, unpack_channels
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


@dataclass(frozen=True)
class Run:
    """Layers one behind the other whose blocks are laid out alike."""

    layers: list[PagedLayer]
    stored: CacheFormat

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of a layer: those of K, those of V, and one for each scale and midpoint of a token."""
        layer = self.layers[0]
        codes = layer.num_kv_heads * layer.head_size
        num_params = CODES[self.stored.k_bits].num_params + CODES[self.stored.v_bits].num_params
        return codes, codes, layer.num_kv_heads * num_params

    @property
    def num_channels(self) -> int:
        """Of a layer."""
        return sum(self.widths)

    def join(self, integers: torch.Tensor) -> torch.Tensor:
        """The chunks `[num_blocks, num_kv_heads, ...]` int8 of channels `[num_blocks, num_channels, block_size]`."""
        layer = self.layers[0]
        num_bytes = layer.block_size * self.stored.content_bytes(layer.head_size)
        chunks = torch.empty(len(integers), layer.num_kv_heads, num_bytes, dtype=torch.int8)
        for plane, codes, place in self._planes(chunks, integers):
            pack_channels(plane, codes, layer.head_size, **place)
        channels, params = self._params(chunks, integers)
        params.copy_(_from_integers(channels))
        return chunks

    def split(self, chunks: torch.Tensor, integers: torch.Tensor) -> None:
        """The inverse of `join`: `integers` are written."""
        for plane, codes, place in self._planes(chunks, integers):
            unpack_channels(codes, plane, self.layers[0].head_size, **place)
        channels, params = self._params(chunks, integers)
        channels.copy_(_to_integers(params))

    def _planes(
        self, chunks: torch.Tensor, integers: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
        """Every plane of codes of chunks, the channels that it belongs to, and its place in them."""
        sizes = (self.layers[0].block_size, self.layers[0].head_size)
        keys, values, _ = integers.split(self.widths, dim=1)
        end = 0
        for bits, codes, of_values in ((self.stored.k_bits, keys, False), (self.stored.v_bits, values, True)):
            shift = 0
            for plane in CODES[bits].planes:
                begin, end = end, end + (plane.v_bytes if of_values else plane.k_bytes)(*sizes)
                yield chunks[..., begin:end], codes, {"bits": plane.bits, "shift": shift, "of_values": of_values}
                shift += plane.bits

    def _params(self, chunks: torch.Tensor, integers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and midpoints as channels and as bits, `[num_blocks, num_kv_heads, num_params, block_size]` int16."""
        channels = integers[:, -self.widths[-1] :].unflatten(1, (-1, self.layers[0].num_kv_heads)).transpose(1, 2)
        num_params, block_size = channels.shape[2:]
        begin = chunks.shape[-1] - num_params * block_size * SCALE_DTYPE.itemsize
        return channels, chunks[..., begin:].view(torch.int16).unflatten(-1, (num_params, block_size))


class CompressedPages(SplitCodec):
    """Pages as another codec lays them out, as integers by channel, entropy-coded.

    The channels of a layer are those of K of all heads, those of V, then what the heads have of scales and midpoints of
    K, then of V.

    Args:
        itemsize: of the elements of other caches.
    """

    def __init__(self, inner: PageCodec, itemsize: int) -> None:
        super().__init__(inner.layers, Compressed(Exact(without_format(inner.layers)), itemsize))
        self._inner = inner
        self._runs = [Run(list(layers), stored) for (stored, *_), layers in groupby(self._ours, self._kind_of)]
        self._num_channels = sum(len(run.layers) * run.num_channels for run in self._runs)
        self._decoder = entropy.Decoder(self._num_channels, self._block_size)

    def _kind_of(self, layer: PagedLayer) -> tuple[CacheFormat | None, int, int]:
        return self._inner.stored_format(layer), layer.num_kv_heads, layer.head_size

    def encode_ours(self, pages: Sequence[torch.Tensor]) -> list[bytes]:
        blocks = torch.empty(len(pages[0]), self._num_channels, self._block_size, dtype=torch.int16)
        rows = iter(blocks.split([run.num_channels for run in self._runs for _ in run.layers], dim=1))
        encoded = map(self._inner.encode_layer, self._ours, pages)
        for run in self._runs:
            for layer in run.layers:
                chunks = next(encoded).cpu().view(torch.int8).reshape(len(blocks), layer.num_kv_heads, -1)
                run.split(chunks, next(rows))
        return entropy.encode(blocks)

    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        integers, rests = read_integers(self._decoder, payloads)
        if integers.dtype != torch.int16:
            raise BadFile("its payload cannot be decoded (it holds integers of more than 16 bits)")
        pages = []
        channels = integers.split([len(run.layers) * run.num_channels for run in self._runs], dim=1)
        for run, own in zip(self._runs, channels, strict=True):
            chunks = run.join(own.reshape(-1, run.num_channels, self._block_size))
            by_layer = chunks.view(torch.uint8).view(len(payloads), len(run.layers), -1).unbind(dim=1)
            pages += map(self._inner.decode_layer, run.layers, by_layer)
        return pages, rests


def _to_integers(bits: torch.Tensor) -> torch.Tensor:
    """Bits of bf16, int16, as integers that are near for like magnitudes: the sign is the last bit, and 1.0 is 0."""
    return (bits << 1 | (bits >> 15 & 1)) - 2 * ONE


def _from_integers(integers: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_integers`."""
    bits = integers + 2 * ONE
    return (bits >> 1 & 0x7FFF) | bits << 15

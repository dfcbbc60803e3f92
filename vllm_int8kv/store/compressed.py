"""What `+zstd` does to the payloads of another codec: fewer bytes, and nothing is lost."""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import zstandard

from vllm_int8kv.cache.formats import CODES, CacheFormat
from vllm_int8kv.store import entropy
from vllm_int8kv.store.channels import pack_channels
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
        keys, values, params = integers.split(self.widths, dim=1)
        layer = self.layers[0]
        sizes = (layer.block_size, layer.head_size)
        num_bytes = layer.block_size * self.stored.content_bytes(layer.head_size)
        chunks = torch.empty(len(integers), layer.num_kv_heads, num_bytes, dtype=torch.int8)
        end = 0
        for bits, codes, of_values in ((self.stored.k_bits, keys, False), (self.stored.v_bits, values, True)):
            shift = 0
            for plane in CODES[bits].planes:
                begin, end = end, end + (plane.v_bytes if of_values else plane.k_bytes)(*sizes)
                options = {"bits": plane.bits, "shift": shift, "of_values": of_values}
                pack_channels(chunks[..., begin:end], codes, layer.head_size, **options)
                shift += plane.bits
        own = _from_integers(params).unflatten(1, (-1, layer.num_kv_heads)).transpose(1, 2)
        chunks[..., end:].view(torch.int16).unflatten(-1, own.shape[2:]).copy_(own)
        return chunks


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
        blocks = np.empty((len(pages[0]), self._num_channels, self._block_size), dtype=np.int16)
        widths = [width for run in self._runs for _ in run.layers for width in run.widths]
        rows = iter(np.split(blocks, np.cumsum(widths)[:-1], axis=1))
        for layer, own in zip(self._ours, pages, strict=True):
            stored = self._inner.stored_format(layer)
            encoded = self._inner.encode_layer(layer, own).cpu()
            shape = (len(own), layer.num_kv_heads, layer.block_size, -1)
            chunks = stored.split(encoded.view(torch.int8).reshape(shape), layer.head_size)
            sizes = (layer.block_size, layer.head_size)
            next(rows)[:] = _k_channels(CODES[stored.k_bits].split_k(chunks.k_codes, *sizes))
            next(rows)[:] = _v_channels(CODES[stored.v_bits].split_v(chunks.v_codes, *sizes))
            params = torch.cat([*chunks.k_params, *chunks.v_params], dim=1)
            next(rows)[:] = _to_integers(params.view(torch.int16)).numpy()
        return [entropy.encode(block) for block in blocks]

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


# NumPy permutes bytes several times as fast as PyTorch, pairs of them more so.


def _k_channels(lines: torch.Tensor) -> np.ndarray:
    """Channels `[num_blocks, num_kv_heads * head_size, block_size]` of K lines."""
    channels = lines.numpy().transpose(0, 1, 3, 5, 2, 4)
    return channels.reshape(len(lines), -1, channels.shape[4] * 16)


def _v_channels(lines: torch.Tensor) -> np.ndarray:
    """As `_k_channels`, of V lines, where two slots of a channel lie side by side."""
    pairs = lines.numpy().view(np.int16)[..., 0].swapaxes(3, 4)
    return np.ascontiguousarray(pairs).view(np.int8).reshape(len(lines), -1, 2 * pairs.shape[4])


def _to_integers(bits: torch.Tensor) -> torch.Tensor:
    """Bits of bf16, int16, as integers that are near for like magnitudes: the sign is the last bit, and 1.0 is 0."""
    return (bits << 1 | (bits >> 15 & 1)) - 2 * ONE


def _from_integers(integers: torch.Tensor) -> torch.Tensor:
    """The inverse of `_to_integers`."""
    bits = integers + 2 * ONE
    return (bits >> 1 & 0x7FFF) | bits << 15

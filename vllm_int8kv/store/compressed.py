"""What `+zstd` does to the payloads of another codec: fewer bytes, and nothing is lost."""

import struct
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import zstandard

from vllm_int8kv.cache.formats import CODES, CacheFormat, Chunks
from vllm_int8kv.cache.quantizer import SCALE_DTYPE
from vllm_int8kv.store import entropy
from vllm_int8kv.store.codecs import Codec, Exact, PageCodec, Payload, SplitCodec, read_integers, without_format
from vllm_int8kv.store.files import BadFile

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
        blocks = np.empty((len(pages[0]), sum(self._widths), self._block_size), dtype=np.int16)
        rows = iter(np.split(blocks, np.cumsum(self._widths)[:-1], axis=1))
        for layer, stored, own in zip(self._ours, self._formats, pages, strict=True):
            encoded = self._inner.encode_layer(layer, own).cpu()
            shape = (len(own), layer.num_kv_heads, layer.block_size, -1)
            chunks = stored.split(encoded.view(torch.int8).reshape(shape), layer.head_size)
            sizes = (layer.block_size, layer.head_size)
            keys = CODES[stored.k_bits].split_k(chunks.k_codes, *sizes)
            values = CODES[stored.v_bits].split_v(chunks.v_codes, *sizes)
            for channels in (_k_channels(keys), *map(_to_integers, chunks.k_params)):
                next(rows)[:] = channels
            for channels in (_v_channels(values), *map(_to_integers, chunks.v_params)):
                next(rows)[:] = channels
        return [entropy.encode(block) for block in blocks]

    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        num_channels = sum(self._widths)
        integers, rests = zip(
            *(read_integers(payload, num_channels, self._block_size) for payload in payloads), strict=True
        )
        rows = iter(np.split(np.stack(integers), np.cumsum(self._widths)[:-1], axis=1))
        pages = []
        for layer, stored in zip(self._ours, self._formats, strict=True):
            k_codes, v_codes = CODES[stored.k_bits], CODES[stored.v_bits]
            keys = k_codes.join_k(_k_lines(next(rows), layer.num_kv_heads))
            k_params = tuple(_from_integers(next(rows)) for _ in range(k_codes.num_params))
            values = v_codes.join_v(_v_lines(next(rows), layer.num_kv_heads))
            v_params = tuple(_from_integers(next(rows)) for _ in range(v_codes.num_params))
            cache = stored.join(Chunks(keys, values, k_params, v_params))
            pages.append(self._inner.decode_layer(layer, cache.flatten(1).view(torch.uint8)))
        return pages, rests


def _widths(stored: CacheFormat, head_size: int) -> list[int]:
    """Integers of a (token, KV head) pair, in the order of their channels."""
    return [w for bits in (stored.k_bits, stored.v_bits) for w in (head_size, *[1] * CODES[bits].num_params)]


# NumPy permutes bytes several times as fast as PyTorch, pairs of them more so.


def _k_channels(lines: torch.Tensor) -> np.ndarray:
    """Channels `[num_blocks, num_kv_heads * head_size, block_size]` of K lines."""
    channels = lines.numpy().transpose(0, 1, 3, 5, 2, 4)
    return channels.reshape(len(lines), -1, channels.shape[4] * 16)


def _k_lines(channels: np.ndarray, num_kv_heads: int) -> torch.Tensor:
    """The inverse of `_k_channels`, of int16."""
    num_blocks, _, block_size = channels.shape
    pairs = channels[:, 0::2] & 0xFF | channels[:, 1::2] << 8  # of dims
    by_group = pairs.reshape(num_blocks, num_kv_heads, -1, block_size // 16, 16)
    lines = np.ascontiguousarray(by_group.swapaxes(2, 3))
    return torch.from_numpy(lines.view(np.int8).reshape(*lines.shape, 2))


def _v_channels(lines: torch.Tensor) -> np.ndarray:
    """As `_k_channels`, of V lines, where two slots of a channel lie side by side."""
    pairs = lines.numpy().view(np.int16)[..., 0].swapaxes(3, 4)
    return np.ascontiguousarray(pairs).view(np.int8).reshape(len(lines), -1, 2 * pairs.shape[4])


def _v_lines(channels: np.ndarray, num_kv_heads: int) -> torch.Tensor:
    """The inverse of `_v_channels`."""
    pairs = channels.astype(np.int8).view(np.int16).reshape(len(channels), num_kv_heads, -1, 16, channels.shape[2] // 2)
    lines = np.ascontiguousarray(pairs.swapaxes(3, 4))
    return torch.from_numpy(lines.view(np.int8).reshape(*lines.shape, 2))


def _to_integers(params: torch.Tensor) -> np.ndarray:
    """The bits of bf16 as integers that are near for like magnitudes: the sign is the last of them, and 1.0 is 0."""
    bits = params.view(torch.int16).numpy().view(np.uint16)
    return (bits << 1 | bits >> 15) - np.uint16(2 * ONE)


def _from_integers(integers: np.ndarray) -> torch.Tensor:
    """The inverse of `_to_integers`."""
    bits = integers.astype(np.uint16) + np.uint16(2 * ONE)
    return torch.from_numpy((bits >> 1 | bits << 15).view(np.int16)).view(SCALE_DTYPE)

"""How the pages of a block become the payload of a file, and back.

A codec sees the pages of all layers, of several blocks at a time: operators on one block of 16 tokens would spend most
of their time on being called.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import zstandard

from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.store import entropy
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.pages import PagedLayer, read_pages, write_pages

AS_THEY_LIE = KeyTransform(rotate=False)
"""Between two formats keys stay equalized and rotated; undoing both and doing it again would cost time and digits."""

Payload = bytes | memoryview


class StoredLayer(Protocol):
    """What codecs ask all layers."""

    name: str
    page_bytes: int
    """Of one block."""


class Codec(ABC):
    """Pages to payloads and back, for the layers of one engine.

    Args:
        layers: in the order of the pages.
    """

    def __init__(self, layers: Sequence[StoredLayer]) -> None:
        self.layers = list(layers)

    @abstractmethod
    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        """The payloads of blocks.

        Args:
            pages: per layer `[num_blocks, ...]`.
        """

    @abstractmethod
    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        """The pages of blocks, as of `encode`, in any dtype.

        Raises:
            BadFile: a payload is none of this codec.
        """


class LayerCodec(Codec):
    """The base of codecs that turn a layer's page into a fixed number of bytes."""

    @abstractmethod
    def layer_bytes(self, layer: StoredLayer) -> int:
        """Of one block."""

    @abstractmethod
    def encode_layer(self, layer: StoredLayer, pages: torch.Tensor) -> torch.Tensor:
        """Bytes of pages, a tensor whose first dimension are the blocks."""

    @abstractmethod
    def decode_layer(self, layer: StoredLayer, rows: torch.Tensor) -> torch.Tensor:
        """Pages of bytes `[num_blocks, layer_bytes]` uint8."""

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        encoded = [
            self.encode_layer(layer, own).reshape(len(own), -1).contiguous().view(torch.uint8)
            for layer, own in zip(self.layers, pages, strict=True)
        ]
        return [memoryview(row.numpy()) for row in torch.cat(encoded, dim=1).cpu()]

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        sizes = [self.layer_bytes(layer) for layer in self.layers]
        rows = np.empty((len(payloads), sum(sizes)), dtype=np.uint8)
        for row, payload in zip(rows, payloads, strict=True):
            if len(payload) != len(row):
                raise BadFile(f"its payload has {len(payload)} bytes, expected {len(row)}")
            row[:] = np.frombuffer(payload, dtype=np.uint8)
        parts = torch.from_numpy(rows).split(sizes, dim=1)
        return [self.decode_layer(layer, part) for layer, part in zip(self.layers, parts, strict=True)]


class Exact(LayerCodec):
    """Pages as they are."""

    def layer_bytes(self, layer: PagedLayer) -> int:
        return layer.page_bytes

    def encode_layer(self, layer: PagedLayer, pages: torch.Tensor) -> torch.Tensor:
        return pages

    def decode_layer(self, layer: PagedLayer, rows: torch.Tensor) -> torch.Tensor:
        return rows.contiguous().view(layer.pages.dtype)


class Requantized(LayerCodec):
    """Pages in a cache format of fewer bits, through the operators; those of layers with another cache as they are.

    Args:
        cache_format: of the payload.
    """

    def __init__(self, layers: Sequence[PagedLayer], cache_format: CacheFormat) -> None:
        super().__init__(layers)
        self._format = cache_format
        self._exact = Exact(layers)

    def _is_exact(self, layer: PagedLayer) -> bool:
        return layer.cache_format is None or layer.cache_format == self._format

    def layer_bytes(self, layer: PagedLayer) -> int:
        if self._is_exact(layer):
            return layer.page_bytes
        return layer.num_kv_heads * layer.block_size * self._format.content_bytes(layer.head_size)

    def encode_layer(self, layer: PagedLayer, pages: torch.Tensor) -> torch.Tensor:
        if self._is_exact(layer):
            return self._exact.encode_layer(layer, pages)
        kv = read_pages(pages, layer.cache_format, AS_THEY_LIE, layer.head_size)
        return write_pages(kv, len(pages), layer.block_size, self._format, AS_THEY_LIE)

    def decode_layer(self, layer: PagedLayer, rows: torch.Tensor) -> torch.Tensor:
        if self._is_exact(layer):
            return self._exact.decode_layer(layer, rows)
        shape = (len(rows), layer.num_kv_heads, layer.block_size, -1)
        stored = rows.contiguous().view(torch.int8).reshape(shape)
        kv = read_pages(stored, self._format, AS_THEY_LIE, layer.head_size)
        return write_pages(kv, len(rows), layer.block_size, layer.cache_format, AS_THEY_LIE)


class Compressed(Codec):
    """Another codec's payloads through zstandard."""

    def __init__(self, inner: Codec) -> None:
        super().__init__(inner.layers)
        self._inner = inner

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        compressor = zstandard.ZstdCompressor(level=entropy.ZSTD_LEVEL)
        return [compressor.compress(payload) for payload in self._inner.encode(pages)]

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        decompressor = zstandard.ZstdDecompressor()
        try:
            return self._inner.decode(
                [decompressor.decompress(payload, allow_extra_data=False) for payload in payloads]
            )
        except zstandard.ZstdError as error:
            raise BadFile(f"its payload cannot be decompressed ({error})") from None

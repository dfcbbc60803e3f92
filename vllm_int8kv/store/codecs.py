"""How the pages of a block become the payload of a file, and back.

A codec sees the pages of all layers, of several blocks at a time: operators on one block of 16 tokens would spend most
of their time on being called.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import torch

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


class PageCodec(LayerCodec):
    """The base of codecs whose bytes are pages, if not those of the cache."""

    @abstractmethod
    def stored_format(self, layer: PagedLayer) -> CacheFormat | None:
        """Of those pages; None where only vLLM understands them."""


class Exact(PageCodec):
    """Pages as they are."""

    def stored_format(self, layer: PagedLayer) -> CacheFormat | None:
        return layer.cache_format

    def layer_bytes(self, layer: PagedLayer) -> int:
        return layer.page_bytes

    def encode_layer(self, layer: PagedLayer, pages: torch.Tensor) -> torch.Tensor:
        return pages

    def decode_layer(self, layer: PagedLayer, rows: torch.Tensor) -> torch.Tensor:
        return rows.contiguous().view(layer.pages.dtype)


class Requantized(PageCodec):
    """Pages in a cache format of fewer bits, through the operators; those of layers with another cache as they are.

    Args:
        cache_format: of the payload.
    """

    def __init__(self, layers: Sequence[PagedLayer], cache_format: CacheFormat) -> None:
        super().__init__(layers)
        self._format = cache_format
        self._exact = Exact(layers)

    def stored_format(self, layer: PagedLayer) -> CacheFormat | None:
        return None if layer.cache_format is None else self._format

    def layer_bytes(self, layer: PagedLayer) -> int:
        if self.stored_format(layer) == layer.cache_format:
            return layer.page_bytes
        return layer.num_kv_heads * layer.block_size * self._format.content_bytes(layer.head_size)

    def encode_layer(self, layer: PagedLayer, pages: torch.Tensor) -> torch.Tensor:
        if self.stored_format(layer) == layer.cache_format:
            return self._exact.encode_layer(layer, pages)
        kv = read_pages(pages, layer.cache_format, AS_THEY_LIE, layer.head_size)
        return write_pages(kv, len(pages), layer.block_size, self._format, AS_THEY_LIE)

    def decode_layer(self, layer: PagedLayer, rows: torch.Tensor) -> torch.Tensor:
        if self.stored_format(layer) == layer.cache_format:
            return self._exact.decode_layer(layer, rows)
        shape = (len(rows), layer.num_kv_heads, layer.block_size, -1)
        stored = rows.contiguous().view(torch.int8).reshape(shape)
        kv = read_pages(stored, self._format, AS_THEY_LIE, layer.head_size)
        return write_pages(kv, len(rows), layer.block_size, layer.cache_format, AS_THEY_LIE)


class SplitCodec(Codec):
    """The base of codecs of caches of this project; what another codec makes of those of vLLM's own lies behind.

    Args:
        others: of the layers without a cache format.
    """

    def __init__(self, layers: Sequence[PagedLayer], others: Codec) -> None:
        super().__init__(layers)
        self._ours = [layer for layer in layers if layer.cache_format is not None]
        self._others = others
        (self._block_size,) = {layer.block_size for layer in self._ours}

    @abstractmethod
    def encode_ours(self, pages: Sequence[torch.Tensor]) -> list[bytes]:
        """As `encode`, of the layers with a cache format."""

    @abstractmethod
    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        """As `decode`, and of every payload what lies behind.

        Raises:
            BadFile: a payload does not begin as one of this codec.
        """

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        by_layer = dict(zip((layer.name for layer in self.layers), pages, strict=True))
        ours = self.encode_ours([by_layer[layer.name] for layer in self._ours])
        if not self._others.layers:
            return ours
        others = self._others.encode([by_layer[layer.name] for layer in self._others.layers])
        return [own + bytes(other) for own, other in zip(ours, others, strict=True)]

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        pages, rests = self.decode_ours([memoryview(payload) for payload in payloads])
        by_layer = dict(zip((layer.name for layer in self._ours), pages, strict=True))
        if self._others.layers:
            names = (layer.name for layer in self._others.layers)
            by_layer |= dict(zip(names, self._others.decode(rests), strict=True))
        elif extra := [len(rest) for rest in rests if rest]:
            raise BadFile(f"its payload has {extra[0]} bytes more than expected")
        return [by_layer[layer.name] for layer in self.layers]


def without_format(layers: Sequence[PagedLayer]) -> list[PagedLayer]:
    """The layers with a cache of vLLM's own."""
    return [layer for layer in layers if layer.cache_format is None]


def read_integers(decoder: entropy.Decoder, payloads: Sequence[memoryview]) -> tuple[torch.Tensor, list[memoryview]]:
    """Entropy-coded integers at the beginnings of payloads, and what lies behind, as `entropy.Decoder`.

    Raises:
        BadFile: there are none, or others.
    """
    try:
        return decoder.decode(payloads)
    except entropy.ERRORS as error:
        raise BadFile(f"its payload cannot be decoded ({error})") from None

"""The codec `bound:R`: every element within a bound, and entropy coding (KVComp, arXiv 2509.00579).

K in the coordinates in which it is equalized, not rotated, and V as it is, are rounded to multiples of a step. The step
is R times the root mean square of a token's K, or V, of one layer, so no element is off by more than half of that. It
follows the token, as attention sinks have small vectors and get most of the attention: with one step per block the
divergence is 1.8 times as large at the same number of bytes. The multiples are integers of few bits of entropy, and
how few differs by channel: rotation, which makes channels alike, is what fixed formats need and entropy coding must not
have.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.cache.quantizer import SCALE_DTYPE
from vllm_int8kv.store import entropy
from vllm_int8kv.store.channels import dequantize_channels, quantize_channels
from vllm_int8kv.store.codecs import Exact, SplitCodec, read_integers, without_format
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.pages import KV, PagedLayer, read_pages, write_pages

MIN_STEP = 1e-30
MIN_NORM = 1e-16
"""Of a vector in fp32; of smaller elements the squares have few digits or none."""
MAX_SHORT_MULTIPLE = 32000
"""With room for the rounding of the steps to bf16."""

Multiples = tuple[torch.Tensor, torch.Tensor]
"""Integers `[num_blocks, num_channels, block_size]` and the steps of their tokens, `[num_blocks, block_size]` fp32."""


def parse_bound(name: str) -> float:
    """R of `bound:R`, `xbound:R` or `xsvd:R`.

    Raises:
        ValueError: it is no number from 0.001 to 1.
    """
    found = re.fullmatch(r"(?:x?bound|xsvd):(\d*\.?\d+)", name)
    if not found or not 1e-3 <= float(found[1]) <= 1:
        codec = name.partition(":")[0]
        raise ValueError(
            f"codec {codec}:R needs R from 0.001 to 1, the step against the root mean square, got {name!r}"
        )
    return float(found[1])


def steps_of(x: torch.Tensor, relative_step: float) -> torch.Tensor:
    """The steps of finite vectors along the last dimension, bf16."""
    norms = torch.linalg.vector_norm(x, dim=-1)
    if (is_coarse := (norms < MIN_NORM) | norms.isinf()).any():
        norms = torch.where(is_coarse, torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64), norms)
    return (relative_step / math.sqrt(x.shape[-1]) * norms).clamp_min(MIN_STEP).to(SCALE_DTYPE)


class Writer:
    """Multiples of steps as bytes of blocks: the steps, then the multiples, entropy-coded.

    Args:
        num_blocks: at the same time.
        widths: how many channels share a step.
        dtype: of the multiples, int16 or int32.
    """

    def __init__(
        self, num_blocks: int, widths: Sequence[int], block_size: int, dtype: torch.dtype = torch.int32
    ) -> None:
        self._multiples = torch.empty(num_blocks, sum(widths), block_size, dtype=dtype)
        self._parts = iter(self._multiples.split(list(widths), dim=1))
        self._steps: list[torch.Tensor] = []

    def add(self, vectors: torch.Tensor, steps: torch.Tensor) -> Multiples:
        """Round vectors `[num_blocks, block_size, next of the widths]` fp32 to multiples of steps, bf16."""
        multiples, factors = next(self._parts), steps.float()
        quantize_channels(multiples, vectors, factors)
        self._steps.append(steps)
        return multiples, factors

    def payloads(self) -> list[bytes]:
        """The bytes of every block."""
        steps = torch.stack(self._steps, dim=1).view(torch.uint8).numpy()
        return [own.tobytes() + block for own, block in zip(steps, entropy.encode(self._multiples), strict=True)]


class Reader:
    """The inverse of `Writer`.

    Args:
        widths: how many channels share a step.
    """

    def __init__(self, widths: Sequence[int], block_size: int) -> None:
        self._widths, self._block_size = list(widths), block_size
        self._decoder = entropy.Decoder(sum(widths), block_size)

    def read(self, payloads: Sequence[memoryview]) -> tuple[list[Multiples], list[memoryview]]:
        """Multiples and their steps for each width, good until the next call, and what lies behind them.

        Raises:
            BadFile: a payload does not begin as one of `Writer`.
        """
        num_steps = len(self._widths) * self._block_size
        num_bytes = num_steps * SCALE_DTYPE.itemsize
        if wrong := [len(payload) for payload in payloads if len(payload) < num_bytes]:
            raise BadFile(f"its payload has {wrong[0]} bytes, expected more")
        multiples, rests = read_integers(self._decoder, [payload[num_bytes:] for payload in payloads])
        rows = np.stack([np.frombuffer(payload, np.int16, num_steps) for payload in payloads])
        steps = torch.from_numpy(rows).view(SCALE_DTYPE).float().split(self._block_size, dim=1)
        return list(zip(multiples.split(self._widths, dim=1), steps, strict=True)), rests

    def read_whole(self, payloads: Sequence[memoryview]) -> list[Multiples]:
        """Of payloads with nothing behind them.

        Raises:
            BadFile: a payload is none of `Writer`.
        """
        multiples, rests = self.read(payloads)
        if extra := [len(rest) for rest in rests if rest]:
            raise BadFile(f"its payload has {extra[0]} bytes more than expected")
        return multiples


class Bounded(SplitCodec):
    """Payloads: the steps of all tokens, multiples of them, exact pages of other caches."""

    def __init__(self, layers: Sequence[PagedLayer], relative_step: float) -> None:
        super().__init__(layers, Exact(without_format(layers)))
        self._relative_step = relative_step
        self._widths = [layer.num_kv_heads * layer.head_size for layer in self._ours for _ in "KV"]
        self._reader = Reader(self._widths, self._block_size)
        # No element is larger than the norm, which is the root mean square times that of the number of channels.
        fits_short = math.sqrt(max(self._widths)) / relative_step < MAX_SHORT_MULTIPLE
        self._dtype = torch.int16 if fits_short else torch.int32

    def encode_ours(self, pages: Sequence[torch.Tensor]) -> list[bytes]:
        kv = (
            read_pages(own, layer.cache_format, _equalized(layer), layer.head_size)
            for layer, own in zip(self._ours, pages, strict=True)
        )
        return self.quantize(kv, len(pages[0])).payloads()

    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        multiples, rests = self._reader.read(payloads)
        pages = (
            write_pages(pair, len(payloads), layer.block_size, layer.cache_format, _equalized(layer))
            for layer, pair in zip(self._ours, self.dequantize(multiples), strict=True)
        )
        return pages, rests

    def quantize(self, kv: Iterable[KV], num_blocks: int) -> Writer:
        """Keys, equalized, and values, by layer, in steps that follow their tokens."""
        writer = Writer(num_blocks, self._widths, self._block_size, self._dtype)
        for pair in kv:
            for x in pair:
                vectors = x.view(num_blocks, self._block_size, -1)
                writer.add(vectors, steps_of(vectors, self._relative_step))
        return writer

    def dequantize(self, multiples: Sequence[Multiples]) -> Iterator[KV]:
        """Keys, equalized, and values, layer by layer: allocators then use the same memory."""
        sides = iter(multiples)
        for layer in self._ours:
            key, value = (dequantize_channels(*next(sides)).view(-1, layer.num_kv_heads, layer.head_size) for _ in "KV")
            yield key, value


def _equalized(layer: PagedLayer) -> KeyTransform:
    """Between a layer's pages and equalized keys."""
    return KeyTransform(rotate=layer.key_transform.rotate)

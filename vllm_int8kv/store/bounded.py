"""The codec `bound:R`: every element within a bound, and entropy coding (KVComp, arXiv 2509.00579).

K in the coordinates in which it is equalized, not rotated, and V as it is, are rounded to multiples of a step. The step
is R times the root mean square of a token's K, or V, of one layer, so no element is off by more than half of that. It
follows the token, as attention sinks have small vectors and get most of the attention: with one step per block the
divergence is 1.8 times as large at the same number of bytes. The multiples are integers of few bits of entropy, and
how few differs by channel: rotation, which makes channels alike, is what fixed formats need and entropy coding must not
have.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.cache.quantizer import SCALE_DTYPE
from vllm_int8kv.store import entropy
from vllm_int8kv.store.channels import dequantize_channels
from vllm_int8kv.store.codecs import Exact, SplitCodec, read_integers, without_format
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.pages import KV, PagedLayer, read_pages, write_pages

MIN_STEP = 1e-30

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
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(MIN_STEP)  # of whose square there may be no fp32
    rms = largest[..., 0] * (x / largest).square().mean(dim=-1).sqrt()
    return (relative_step * rms).clamp_min(MIN_STEP).to(SCALE_DTYPE)


def join(multiples: np.ndarray, steps: torch.Tensor) -> list[bytes]:
    """Blocks as bytes: the steps, then the multiples, entropy-coded.

    Args:
        multiples: [num_blocks, num_channels, block_size] int32.
        steps: [num_blocks, num_vectors, block_size] bf16.
    """
    scales = steps.contiguous().view(torch.uint8).numpy()
    return [own.tobytes() + entropy.encode(block) for own, block in zip(scales, multiples, strict=True)]


class Reader:
    """The inverse of `join`.

    Args:
        widths: how many channels share a step.
    """

    def __init__(self, widths: Sequence[int], block_size: int) -> None:
        self._widths, self._block_size = list(widths), block_size
        self._decoder = entropy.Decoder(sum(widths), block_size)

    def read(self, payloads: Sequence[memoryview]) -> tuple[list[Multiples], list[memoryview]]:
        """Multiples and their steps for each width, good until the next call, and what lies behind them.

        Raises:
            BadFile: a payload does not begin as one of `join`.
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
            BadFile: a payload is none of `join`.
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

    def encode_ours(self, pages: Sequence[torch.Tensor]) -> list[bytes]:
        kv = [
            read_pages(own, layer.cache_format, _equalized(layer), layer.head_size)
            for layer, own in zip(self._ours, pages, strict=True)
        ]
        return join(*self.quantize(kv))

    def decode_ours(self, payloads: Sequence[memoryview]) -> tuple[Iterable[torch.Tensor], Sequence[memoryview]]:
        multiples, rests = self._reader.read(payloads)
        pages = (
            write_pages(pair, len(payloads), layer.block_size, layer.cache_format, _equalized(layer))
            for layer, pair in zip(self._ours, self.dequantize(multiples), strict=True)
        )
        return pages, rests

    def quantize(self, kv: Sequence[KV]) -> tuple[np.ndarray, torch.Tensor]:
        """Multiples `[num_blocks, num_channels, block_size]` int32, steps `[num_blocks, 2 * num_layers, block_size]`.

        Args:
            kv: by layer, keys equalized.
        """
        num_blocks = len(kv[0][0]) // self._block_size
        multiples = torch.empty(num_blocks, sum(self._widths), self._block_size, dtype=torch.int32)
        steps = []
        sides = (x for pair in kv for x in pair)
        for x, own in zip(sides, multiples.split(self._widths, dim=1), strict=True):
            blocks = x.view(num_blocks, self._block_size, -1)
            step = steps_of(blocks, self._relative_step)
            own.copy_(torch.round(blocks / step.float()[..., None]).transpose(1, 2))
            steps.append(step)
        return multiples.numpy(), torch.stack(steps, dim=1)

    def dequantize(self, multiples: Sequence[Multiples]) -> Iterator[KV]:
        """Keys, equalized, and values, layer by layer: allocators then use the same memory."""
        sides = iter(multiples)
        for layer in self._ours:
            key, value = (dequantize_channels(*next(sides)).view(-1, layer.num_kv_heads, layer.head_size) for _ in "KV")
            yield key, value


def _equalized(layer: PagedLayer) -> KeyTransform:
    """Between a layer's pages and equalized keys."""
    return KeyTransform(rotate=layer.key_transform.rotate)

"""The codec `bound:R`: every element within a bound, and entropy coding (KVComp, arXiv 2509.00579).

K in the coordinates in which it is equalized, not rotated, and V as it is, are rounded to multiples of a step. The step
is R times the root mean square of a block's K, or V, of one layer, so no element is off by more than half of that. The
multiples are integers of few bits of entropy, and how few differs by channel: rotation, which makes channels alike, is
what fixed formats need and entropy coding must not have. Channels of similar spread share a Huffman table (zstandard
makes one per frame), where KVComp's own tables come from the first chunk and know no code for what comes later.
"""

import re
import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from vllm_int8kv.store.codecs import ZSTD_LEVEL, Codec, Exact, Payload
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.pages import KV, PagedLayer

NUM_CLASSES = 16
"""Of channels: each has a Huffman table of its own, some 50 bytes."""
ESCAPE = -128
"""Stands for a multiple beyond 127, which is listed apart."""


def parse_bound(name: str) -> float:
    """R of `bound:R`.

    Raises:
        ValueError: it is no number from 0.001 to 1.
    """
    found = re.fullmatch(r"bound:(\d*\.?\d+)", name)
    if not found or not 1e-3 <= float(found[1]) <= 1:
        raise ValueError(f"codec bound:R needs R from 0.001 to 1, the step against the root mean square, got {name!r}")
    return float(found[1])


class Bounded(Codec):
    """Payloads: steps, escaped multiples, the classes of channels, a frame per class, exact pages of other caches."""

    def __init__(self, layers: Sequence[PagedLayer], relative_step: float) -> None:
        super().__init__(layers)
        self._relative_step = relative_step
        self._ours = [layer for layer in layers if layer.cache_format is not None]
        self._others = [layer for layer in layers if layer.cache_format is None]
        self._num_channels = sum(2 * layer.num_kv_heads * layer.head_size for layer in self._ours)
        (self._block_size,) = {layer.block_size for layer in self._ours}

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        by_layer = dict(zip((layer.name for layer in self.layers), pages, strict=True))
        multiples, steps = self.quantize([layer.read(by_layer[layer.name]) for layer in self._ours])
        others = [by_layer[layer.name] for layer in self._others]
        rest = Exact(self._others).encode(others) if others else [b""] * len(multiples)
        return [self._pack(*block) for block in zip(multiples, steps, rest, strict=True)]

    def decode(self, payloads: Sequence[Payload]) -> list[torch.Tensor]:
        try:
            blocks = [self._unpack(payload) for payload in payloads]
        except (zstandard.ZstdError, struct.error, ValueError, IndexError) as error:
            raise BadFile(f"its payload cannot be decoded ({error})") from None
        multiples, steps, rest = zip(*blocks, strict=True)
        kv = self.dequantize(np.stack(multiples), np.stack(steps))
        ours = {layer.name: layer.write(own) for layer, own in zip(self._ours, kv, strict=True)}
        if self._others:
            ours |= dict(zip((layer.name for layer in self._others), Exact(self._others).decode(rest), strict=True))
        return [ours[layer.name] for layer in self.layers]

    def quantize(self, kv: Sequence[KV]) -> tuple[np.ndarray, np.ndarray]:
        """Multiples `[num_blocks, num_channels, block_size]` int32 and steps `[num_blocks, 2 * num_layers]` fp32."""
        multiples, steps = [], []
        for layer, pair in zip(self._ours, kv, strict=True):
            for x in self._equalized(layer, pair):
                blocks = x.view(-1, self._block_size, x.shape[1] * x.shape[2])
                step = self._relative_step * blocks.square().mean(dim=(1, 2)).sqrt().clamp_min(1e-30)
                multiples.append(torch.round(blocks / step[:, None, None]).transpose(1, 2).int())
                steps.append(step)
        return torch.cat(multiples, dim=1).cpu().numpy(), torch.stack(steps, dim=1).cpu().numpy()

    def dequantize(self, multiples: np.ndarray, steps: np.ndarray) -> list[KV]:
        """Keys and values of multiples and steps."""
        kv, channel, side = [], 0, 0
        for layer in self._ours:
            pair = []
            for _ in range(2):
                width = layer.num_kv_heads * layer.head_size
                own = torch.from_numpy(multiples[:, channel : channel + width]).float()
                x = own.transpose(1, 2) * torch.from_numpy(steps[:, side]).view(-1, 1, 1)
                pair.append(x.reshape(-1, layer.num_kv_heads, layer.head_size).contiguous())
                channel, side = channel + width, side + 1
            factors = layer.key_transform.equalizer
            kv.append((pair[0] if factors is None else pair[0] * factors.cpu(), pair[1]))
        return kv

    def _equalized(self, layer: PagedLayer, pair: KV) -> KV:
        factors = layer.key_transform.equalizer
        return pair if factors is None else (pair[0] / factors, pair[1])

    def _pack(self, multiples: np.ndarray, steps: np.ndarray, rest: Payload) -> bytes:
        beyond = np.flatnonzero(np.abs(multiples) > 127)
        codes = multiples.clip(ESCAPE, 127)
        codes.flat[beyond] = ESCAPE
        codes = codes.astype(np.int8)
        classes = _classes(multiples)
        compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        frames = [compressor.compress(codes[classes == number].tobytes()) for number in range(NUM_CLASSES)]
        pairs = (classes[0::2] << 4 | classes[1::2]).astype(np.uint8)  # head sizes are even
        head = struct.pack(f"<II{NUM_CLASSES}I", len(beyond), len(pairs), *map(len, frames))
        escaped = beyond.astype("<u4").tobytes() + multiples.flat[beyond].astype("<i4").tobytes()
        return b"".join([head, steps.astype("<f4").tobytes(), escaped, pairs.tobytes(), *frames, rest])

    def _unpack(self, payload: Payload) -> tuple[np.ndarray, np.ndarray, Payload]:
        payload, layout = memoryview(payload), struct.Struct(f"<II{NUM_CLASSES}I")
        num_beyond, num_pairs, *sizes = layout.unpack_from(payload)
        at = layout.size

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal at
            found = np.frombuffer(payload, dtype, count, at)
            at += found.nbytes
            return found

        steps = take("<f4", 2 * len(self._ours))
        beyond, values, pairs = take("<u4", num_beyond), take("<i4", num_beyond), take("u1", num_pairs)
        classes = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
        multiples = np.empty((self._num_channels, self._block_size), dtype=np.int32)
        decompressor = zstandard.ZstdDecompressor()
        for number, size in enumerate(sizes):
            codes = np.frombuffer(decompressor.decompress(payload[at : at + size]), np.int8)
            multiples[classes == number] = codes.reshape(-1, self._block_size)
            at += size
        multiples.flat[beyond] = values
        return multiples, steps, payload[at:]


def _classes(multiples: np.ndarray) -> np.ndarray:
    """The class of every channel: by spread, equally many in each."""
    spread = np.square(multiples, dtype=np.float32).sum(axis=1)
    order = np.argsort(spread, kind="stable")
    classes = np.empty(len(spread), dtype=np.int64)
    classes[order] = np.arange(len(spread)) * NUM_CLASSES // len(spread)
    return classes

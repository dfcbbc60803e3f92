"""How many bytes codes take: packed, behind zstandard, and as their entropy allows at best."""

from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from benchmarks.accuracy.xquant.remat import Coded

Texts = Sequence[Sequence[Coded]]
"""By text and layer."""
NUM_CLASSES = 16
"""Of channels: each has a Huffman table of its own."""
ZSTD_LEVEL = 1


def fixed_bytes(texts: Texts) -> float | None:
    """Bytes per token, scales included, of codes of equal length; None where these have none."""
    if any(coded.bits is None for layers in texts for coded in layers):
        return None
    sizes = [
        _num_tokens(layers) * sum(coded.codes.shape[1] * coded.bits / 8 + coded.param_bytes for coded in layers)
        for layers in texts
    ]
    return sum(sizes) / sum(map(_num_tokens, texts))


def zstd_bytes(texts: Texts, block_size: int) -> float:
    """Bytes per token, scales included, of blocks of tokens in a layout that shows what a codec is worth.

    The store takes the means of channels off besides, which saves it 3 to 10 % (`vllm_int8kv.store.entropy`). A block
    holds all layers. Codes lie channel by channel; channels are sorted by spread, and every sixteenth of them is a
    frame with a Huffman table of its own. Channels with a code beyond 8 bits lie in two more frames, low and high bytes
    apart. Tokens behind the last full block do not count.
    """
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    num_bytes = num_tokens = 0
    for layers in texts:
        codes = torch.cat([coded.codes for coded in layers], dim=1).numpy()
        param_bytes = sum(coded.param_bytes for coded in layers)
        for start in range(0, len(codes) - block_size + 1, block_size):
            frames = _frames(np.ascontiguousarray(codes[start : start + block_size].T))
            num_bytes += sum(len(compressor.compress(frame.tobytes())) for frame in frames)
            num_bytes += codes.shape[1] / 2 + 4 * len(frames) + block_size * param_bytes  # half a byte names a class
            num_tokens += block_size
    return num_bytes / num_tokens


def _frames(by_channel: np.ndarray) -> list[np.ndarray]:
    """What is compressed on its own of `[num_channels, block_size]`."""
    is_wide = (by_channel.max(axis=1) > 127) | (by_channel.min(axis=1) < -128)
    wide, narrow = by_channel[is_wide], by_channel[~is_wide].astype(np.int8)
    order = np.argsort(np.square(narrow, dtype=np.float32).sum(axis=1), kind="stable")
    frames = np.array_split(narrow[order], NUM_CLASSES)
    return [*frames, (wide & 255).astype(np.uint8), (wide >> 8).astype(np.int8)] if len(wide) else frames


def ideal_bytes(texts: Texts) -> float:
    """Bytes per token, scales included, at the order-0 entropy of every channel over a whole text, tables not counted.

    Too low by about (distinct codes - 1) / (2 ln 2 num_tokens) bits per code, 0.07 at 100 codes and 1,024 tokens.
    """
    bits, num_tokens, param_bytes = 0.0, 0, 0.0
    for layers in texts:
        count = _num_tokens(layers)
        num_tokens += count
        for coded in layers:
            codes = coded.codes.numpy().astype(np.int64)
            codes -= codes.min()
            width = int(codes.max()) + 1
            offsets = width * np.arange(codes.shape[1])
            seen = np.bincount((codes + offsets).ravel(), minlength=width * codes.shape[1])
            seen = seen[seen > 0]
            bits -= (seen * np.log2(seen / count)).sum()
            param_bytes += count * coded.param_bytes
    return (bits / 8 + param_bytes) / num_tokens


def _num_tokens(layers: Sequence[Coded]) -> int:
    return len(layers[0].codes)

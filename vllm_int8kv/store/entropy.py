"""Entropy coding of integers whose spread differs by channel.

Channels of similar spread share a Huffman table (zstandard makes one per frame), where KVComp's own tables (arXiv
2509.00579) come from the first chunk and know no code for what comes later.
"""

import struct

import numpy as np
import zstandard

NUM_CLASSES = 16
"""Of channels: each has a Huffman table of its own, some 50 bytes."""
ESCAPE = -128
"""Stands for an integer beyond 127, which is listed apart."""
ZSTD_LEVEL = 1
"""Higher ones gain less than a percent on codes, at a fraction of the speed."""
HEAD = struct.Struct(f"<III{NUM_CLASSES}I")
ERRORS = (zstandard.ZstdError, struct.error, ValueError, IndexError)
"""What `decode` raises of bytes that are none of `encode`."""


def encode(integers: np.ndarray) -> bytes:
    """Bytes of integers `[num_channels, num_tokens]` int32, with an even number of channels."""
    beyond = np.flatnonzero(np.abs(integers) > 127)
    codes = integers.clip(ESCAPE, 127)
    codes.flat[beyond] = ESCAPE
    codes = codes.astype(np.int8)
    classes = _classes(integers)
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    frames = [compressor.compress(codes[classes == number].tobytes()) for number in range(NUM_CLASSES)]
    pairs = (classes[0::2] << 4 | classes[1::2]).astype(np.uint8)
    escaped = beyond.astype("<u4").tobytes() + integers.flat[beyond].astype("<i4").tobytes()
    sizes = [len(beyond), len(pairs), integers.shape[1], *map(len, frames)]
    return b"".join([HEAD.pack(*sizes), escaped, pairs.tobytes(), *frames])


def decode(data: bytes | memoryview) -> tuple[np.ndarray, int]:
    """The inverse of `encode`: int32, and how many bytes it took of those given.

    Raises:
        one of `ERRORS`: they are none.
    """
    num_beyond, num_pairs, num_tokens, *sizes = HEAD.unpack_from(data)
    at = HEAD.size

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(data, dtype, count, at)
        at += found.nbytes
        return found

    beyond, values, pairs = take("<u4", num_beyond), take("<i4", num_beyond), take("u1", num_pairs)
    classes = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
    codes = np.empty((2 * num_pairs, num_tokens), dtype=np.int8)
    decompressor = zstandard.ZstdDecompressor()
    for number, size in enumerate(sizes):
        frame = np.frombuffer(decompressor.decompress(data[at : at + size]), np.int8)
        codes[classes == number] = frame.reshape(-1, num_tokens)
        at += size
    integers = codes.astype(np.int32)
    integers.flat[beyond] = values
    return integers, at


def _classes(integers: np.ndarray) -> np.ndarray:
    """The class of every channel: by spread, equally many in each."""
    spread = np.square(integers, dtype=np.float32).sum(axis=1)
    order = np.argsort(spread, kind="stable")
    classes = np.empty(len(spread), dtype=np.int64)
    classes[order] = np.arange(len(spread)) * NUM_CLASSES // len(spread)
    return classes

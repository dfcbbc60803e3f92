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
MAX_ESCAPES = 1 / 16
"""Of the integers of a channel; one with more is wide: its low and high bytes lie in two more frames."""
ZSTD_LEVEL = 1
"""Higher ones gain less than a percent on codes, at a fraction of the speed."""
HEAD = struct.Struct(f"<III{NUM_CLASSES + 2}I")
ERRORS = (zstandard.ZstdError, struct.error, ValueError, IndexError)
"""What `decode` raises of bytes that are none of `encode`."""


def encode(integers: np.ndarray) -> bytes:
    """Bytes of integers `[num_channels, num_tokens]` int32, with an even number of channels."""
    is_beyond = _is_beyond(integers, 127)
    is_wide = is_beyond.sum(axis=1) > MAX_ESCAPES * integers.shape[1]
    is_beyond[is_wide] = _is_beyond(integers[is_wide], 32767)
    codes = integers.astype(np.int16)
    codes[is_beyond] = ESCAPE
    narrow, wide = codes.astype(np.int8), codes[is_wide]
    classes = np.zeros(len(integers), dtype=np.int64)
    classes[~is_wide] = _classes(integers[~is_wide])
    parts = [narrow[(classes == number) & ~is_wide] for number in range(NUM_CLASSES)]
    parts += [wide.astype(np.int8), (wide >> 8).astype(np.int8)]
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    frames = [compressor.compress(part.tobytes()) for part in parts]
    pairs = (classes[0::2] << 4 | classes[1::2]).astype(np.uint8)
    beyond = np.flatnonzero(is_beyond)
    escaped = beyond.astype("<u4").tobytes() + integers.flat[beyond].astype("<i4").tobytes()
    sizes = [len(beyond), len(pairs), integers.shape[1], *map(len, frames)]
    return b"".join([HEAD.pack(*sizes), escaped, pairs.tobytes(), np.packbits(is_wide).tobytes(), *frames])


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
    is_wide = np.unpackbits(take("u1", -(-2 * num_pairs // 8)), count=2 * num_pairs).astype(bool)
    classes = np.stack([pairs >> 4, pairs & 15], axis=1).ravel()
    decompressor = zstandard.ZstdDecompressor()
    frames = []
    for size in sizes:
        frames.append(np.frombuffer(decompressor.decompress(data[at : at + size]), np.int8).reshape(-1, num_tokens))
        at += size
    integers = np.empty((2 * num_pairs, num_tokens), dtype=np.int32)
    for number, frame in enumerate(frames[:NUM_CLASSES]):
        integers[(classes == number) & ~is_wide] = frame
    low, high = frames[NUM_CLASSES:]
    integers[is_wide] = (high.astype(np.int32) << 8) | low.view(np.uint8)
    integers.flat[beyond] = values
    return integers, at


def _is_beyond(integers: np.ndarray, limit: int) -> np.ndarray:
    return (integers < -limit) | (integers > limit)  # -2**31 has no absolute value


def _classes(integers: np.ndarray) -> np.ndarray:
    """The class of every channel: by spread, equally many in each."""
    spread = np.square(integers, dtype=np.float32).sum(axis=1)
    order = np.argsort(spread, kind="stable")
    classes = np.empty(len(spread), dtype=np.int64)
    classes[order] = np.arange(len(spread)) * NUM_CLASSES // len(spread)
    return classes

"""Entropy coding of integers whose spread differs by channel.

Channels of like spread share a Huffman table (zstandard makes one per frame), where KVComp's own tables (arXiv
2509.00579) come from the first chunk and know no code for what comes later.
"""

import struct

import numpy as np
import zstandard

NUM_CLASSES = 16
"""Of channels: each has a Huffman table of its own, some 50 bytes."""
CLASSES_PER_OCTAVE = 2
"""Of the root mean square of a channel: within a class it differs by less than a factor of 1.5."""
FIRST_RMS = 2.0**-2
"""Below it nearly all integers of a channel are 0."""
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
    num_tokens = integers.shape[1]
    is_beyond = _is_beyond(integers, 127)
    is_wide = np.count_nonzero(is_beyond, axis=1) > MAX_ESCAPES * num_tokens
    is_beyond[is_wide] = _is_beyond(integers[is_wide], 32767)
    beyond = np.flatnonzero(is_beyond)
    codes = integers.astype(np.int8)
    codes.flat[beyond] = ESCAPE
    classes = _classes(integers)
    order, counts = _order(classes, is_wide)
    wide = integers[is_wide]
    wide[is_beyond[is_wide]] = ESCAPE
    parts = np.split(codes[order], np.cumsum(counts)[:-1])
    parts += [wide.astype(np.int8), (wide >> 8).astype(np.int8)]
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    frames = [compressor.compress(part.tobytes()) for part in parts]
    pairs = classes[0::2] << 4 | classes[1::2]
    escaped = beyond.astype("<u4").tobytes() + integers.flat[beyond].astype("<i4").tobytes()
    sizes = [len(beyond), len(pairs), num_tokens, *map(len, frames)]
    return b"".join([HEAD.pack(*sizes), escaped, pairs.tobytes(), np.packbits(is_wide).tobytes(), *frames])


def decode(data: bytes | memoryview) -> tuple[np.ndarray, int]:
    """The inverse of `encode`, and how many bytes it took of those given.

    The integers are int16 if all fit, else int32.

    Raises:
        one of `ERRORS`: they are none.
    """
    num_beyond, num_pairs, num_tokens, *sizes = HEAD.unpack_from(data)
    num_channels, at = 2 * num_pairs, HEAD.size

    def take(dtype: str, count: int) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(data, dtype, count, at)
        at += found.nbytes
        return found

    beyond, values, pairs = take("<u4", num_beyond), take("<i4", num_beyond), take("u1", num_pairs)
    is_wide = np.unpackbits(take("u1", -(-num_channels // 8)), count=num_channels).astype(bool)
    order, counts = _order(np.stack([pairs >> 4, pairs & 15], axis=1).ravel(), is_wide)
    decompressor = zstandard.ZstdDecompressor()
    frames = []
    for size in sizes:
        frames.append(decompressor.decompress(data[at : at + size]))
        at += size
    if [len(frame) for frame in frames[:NUM_CLASSES]] != (counts * num_tokens).tolist():
        raise ValueError("the frames are not as long as their channels")
    is_short = not _is_beyond(values, 32767).any()
    rows = np.empty((num_channels, num_tokens), dtype=np.int8)
    rows[order] = np.frombuffer(b"".join(frames[:NUM_CLASSES]), np.int8).reshape(-1, num_tokens)
    integers = rows.astype(np.int16 if is_short else np.int32)
    low, high = (np.frombuffer(frame, np.int8).reshape(-1, num_tokens) for frame in frames[NUM_CLASSES:])
    integers[is_wide] = high.astype(np.int16) << 8 | low.view(np.uint8)
    integers.flat[beyond] = values
    return integers, at


def _is_beyond(integers: np.ndarray, limit: int) -> np.ndarray:
    """Whether magnitudes of int32 are above a limit: what is below -limit wraps around to far above it."""
    return (integers + np.int32(limit)).view(np.uint32) > 2 * limit


def _classes(integers: np.ndarray) -> np.ndarray:
    """The class of every channel, uint8."""
    floats = integers.astype(np.float32)
    squares = np.einsum("ct,ct->c", floats, floats) / integers.shape[1]
    steps = CLASSES_PER_OCTAVE / 2 * np.log2(np.maximum(squares, 1e-9) / FIRST_RMS**2)
    return steps.clip(0, NUM_CLASSES - 1).astype(np.uint8)


def _order(classes: np.ndarray, is_wide: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The channels that are not wide, class by class, and how many each class has."""
    narrow = np.flatnonzero(~is_wide)
    own = classes[narrow]
    return narrow[np.argsort(own, kind="stable")], np.bincount(own, minlength=NUM_CLASSES)

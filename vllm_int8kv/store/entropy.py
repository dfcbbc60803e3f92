"""Entropy coding of integers whose mean and spread differ by channel.

The mean of a channel is taken off, and channels of like spread share a Huffman table (zstandard makes one per frame),
where KVComp's own tables (arXiv 2509.00579) come from the first chunk and know no code for what comes later.
"""

import struct
from collections.abc import Sequence

import numpy as np
import torch
import zstandard

from vllm_int8kv.store.channels import measure_channels, restore_channels, split_channels

NUM_CLASSES = 16
"""Of channels that share a Huffman table, which takes some 50 bytes."""
CLASSES_PER_OCTAVE = 2
"""Of the root mean square of a channel: within a class it differs by less than a factor of 1.5."""
FIRST_RMS = 2.0**-2
"""Below it nearly all integers of a channel are 0."""
MAX_NARROW = 127
"""Of the difference of an integer to the mean of its channel; those beyond are escapes, which are listed apart."""
MAX_ESCAPES = 1 / 16
"""Of the integers of a channel; one with more is wide: low and high bytes of its differences lie in two more frames."""
WIDE = NUM_CLASSES
"""In the place of the class of a wide channel."""
MAX_WIDE = 16383
"""Of the mean of a channel, and of a difference in a wide one that is no escape: their sum fits 16 bits."""
MEAN_SHIFTS = (np.arange(NUM_CLASSES + 1) // CLASSES_PER_OCTAVE - 3).clip(0, 3).astype(np.int16)
"""By class: means are multiples of 2 to the power of this, at most half of the root mean square. A bit less of a mean
that 32 tokens share saves 0.03 bits per integer, and steps of half the spread cost half of that."""
NUM_FRAMES = NUM_CLASSES + 5
"""Besides classes and wide channels: the names of the classes, low and high bytes of means."""
COMPRESSION = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7
)
"""Huffman codes, and hardly a search for what repeats: five codes of three bits that lie somewhere before by chance
take more as a reference than as codes. Those of k4v4 take 2 % less than at zstandard's level 1, and a third of the
time."""
HEAD = struct.Struct(f"<III{NUM_FRAMES}I")
ERRORS = (zstandard.ZstdError, struct.error, ValueError, IndexError, RuntimeError)
"""What a `Decoder` raises of bytes that are none of `encode`."""


def encode(integers: torch.Tensor) -> list[bytes]:
    """Bytes of the integers of every block, `[num_blocks, num_channels, num_tokens]` int16 or int32."""
    num_blocks, num_channels, num_tokens = integers.shape
    averages, squares, largest = measure_channels(integers).numpy().swapaxes(0, 1)
    classes = _classes(squares)
    multiples, means = _round_means(averages, classes)
    # Of most channels it is known without looking at their integers that they have no escapes.
    suspects = (largest + np.abs(averages - means) >= MAX_NARROW).nonzero()
    rows = integers.numpy()[suspects].astype(np.int32)
    is_escape = _is_beyond(rows - means[suspects][:, None], MAX_NARROW)
    is_wide = np.count_nonzero(is_escape, axis=1) > MAX_ESCAPES * num_tokens
    wide = tuple(places[is_wide] for places in suspects)
    classes[wide] = WIDE
    multiples[wide], means[wide] = _round_means(averages[wide], classes[wide])
    is_escape[is_wide] = _is_beyond(rows[is_wide] - means[wide][:, None], MAX_WIDE)
    of_rows, tokens = is_escape.nonzero()
    blocks, channels = (places[of_rows] for places in suspects)
    escapes = (channels * num_tokens + tokens).astype("<u4"), rows[is_escape].astype("<i4")
    bounds = np.searchsorted(blocks, range(num_blocks + 1))
    compressor = zstandard.ZstdCompressor(compression_params=COMPRESSION)
    codes, encoded = torch.empty(num_channels, num_tokens, dtype=torch.int8), []
    for block in range(num_blocks):
        num_rows = np.bincount(classes[block], minlength=WIDE + 1)
        high = torch.empty(num_rows[WIDE], num_tokens, dtype=torch.int8)
        arrays = map(torch.from_numpy, (num_rows, classes[block], means[block]))
        split_channels(codes, high, integers[block : block + 1], *arrays, max_wide=MAX_WIDE)
        of_classes = np.split(codes.numpy(), np.cumsum(num_rows)[:-1])
        parts = [classes[block], *_bytes_of(multiples[block]), *of_classes, high.numpy()]
        frames = [compressor.compress(part) if part.size else b"" for part in parts]
        places, values = (part[bounds[block] : bounds[block + 1]] for part in escapes)
        head = HEAD.pack(len(places), num_channels, num_tokens, *map(len, frames))
        encoded.append(b"".join([head, places.tobytes(), values.tobytes(), *frames]))
    return encoded


class Decoder:
    """The inverse of `encode`, for blocks of as many integers each.

    It is for one thread at a time, and keeps the memory of what it returns: what is new to a process takes as long to
    be touched as to be decoded.
    """

    def __init__(self, num_channels: int, num_tokens: int) -> None:
        self._shape = (num_channels, num_tokens)
        self._kept = torch.empty(0, *self._shape, dtype=torch.int16)
        self._decompressor = zstandard.ZstdDecompressor()

    def decode(self, blocks: Sequence[memoryview]) -> tuple[torch.Tensor, list[memoryview]]:
        """Integers `[num_blocks, num_channels, num_tokens]`, int16 if all fit, else int32, and what lies behind them.

        The integers are good until the next call.

        Raises:
            one of `ERRORS`: a block does not begin as one of `encode`, or has other channels or tokens.
        """
        if all(_fits_short(block) for block in blocks):
            if len(self._kept) < len(blocks):
                self._kept = torch.empty(len(blocks), *self._shape, dtype=torch.int16)
            integers = self._kept[: len(blocks)]
        else:
            integers = torch.empty(len(blocks), *self._shape, dtype=torch.int32)
        return integers, [block[self._fill(own, block) :] for own, block in zip(integers, blocks, strict=True)]

    def _fill(self, integers: torch.Tensor, data: memoryview) -> int:
        """Fill integers `[num_channels, num_tokens]`, and return how many bytes of the data they took."""
        _, num_channels, num_tokens, *sizes = HEAD.unpack_from(data)
        if (num_channels, num_tokens) != self._shape:
            raise ValueError(f"it holds {[num_channels, num_tokens]} integers")
        beyond, values = _escapes(data)
        at = HEAD.size + beyond.nbytes + values.nbytes
        frames = []
        for size in sizes:
            frame = self._decompressor.decompress(data[at : at + size]) if size else b""
            frames.append(np.frombuffer(frame, np.int8))
            at += size
        names, low_means, high_means, *of_classes, high = frames
        classes = names.view(np.uint8).copy()
        multiples = _integers_of(low_means, high_means)
        if not len(classes) == len(multiples) == num_channels:
            raise ValueError("the channels are not as many as their classes and means")
        codes = np.concatenate(of_classes).reshape(-1, num_tokens)
        num_rows = np.array([len(frame) // num_tokens for frame in of_classes])
        means = multiples << MEAN_SHIFTS.take(classes)
        arrays = (codes, high.reshape(-1, num_tokens).copy(), num_rows, classes, means)
        restore_channels(integers[None], *map(torch.from_numpy, arrays))
        found = integers.numpy()
        found.reshape(-1)[beyond] = values
        return at


def _escapes(data: memoryview) -> tuple[np.ndarray, np.ndarray]:
    """Places and values of the integers that are listed apart."""
    num_beyond, *_ = HEAD.unpack_from(data)
    beyond = np.frombuffer(data, "<u4", num_beyond, HEAD.size)
    return beyond, np.frombuffer(data, "<i4", num_beyond, HEAD.size + beyond.nbytes)


def _fits_short(data: memoryview) -> bool:
    return not _is_beyond(_escapes(data)[1], 32767).any()


def _is_beyond(differences: np.ndarray, limit: int) -> np.ndarray:
    """Whether magnitudes of int32 are above a limit: what is below -limit wraps around to far above it."""
    return (differences + np.int32(limit)).view(np.uint32) > 2 * limit


def _bytes_of(integers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Low and high bytes of int16, such that small integers have a high byte of 0."""
    low = integers.astype(np.int8)
    return low, ((integers - low) >> 8).astype(np.int8)


def _integers_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The inverse of `_bytes_of`."""
    return (high.astype(np.int16) << 8) + low


def _classes(squares: np.ndarray) -> np.ndarray:
    """The classes of channels, uint8, from the mean squares of the differences to their means."""
    steps = CLASSES_PER_OCTAVE / 2 * np.log2(np.maximum(squares, 1e-9) / FIRST_RMS**2)
    return steps.clip(0, NUM_CLASSES - 1).astype(np.uint8)


def _round_means(averages: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages of channels as multiples of the step of their classes, and those times the step, int16."""
    shifts = MEAN_SHIFTS[classes]
    multiples = np.rint(averages.clip(-MAX_WIDE, MAX_WIDE) / (1 << shifts)).astype(np.int16)
    return multiples, multiples << shifts

"""Operators on the integers of blocks, channel by channel: one typed wrapper each, on CPU.

The arguments are checked in `csrc/ops/store_ops.cpp`; a bad one raises RuntimeError naming the argument, what was
expected and what came. They run on the calling thread and do not hold the interpreter.
"""

import torch

from vllm_int8kv.cache import library as library  # loads the operators


def measure_channels(integers: torch.Tensor) -> torch.Tensor:
    """Of every channel the mean, the mean square of the differences to it, and the largest of their magnitudes.

    Args:
        integers: [num_blocks, num_channels, block_size] int16 or int32; any stride between blocks.

    Returns:
        [num_blocks, 3, num_channels] fp32.
    """
    moments = torch.empty(len(integers), 3, integers.shape[1])
    torch.ops.int8kv.measure_channels(moments, integers)
    return moments


def split_channels(
    codes: torch.Tensor,
    high_bytes: torch.Tensor,
    integers: torch.Tensor,
    num_rows: torch.Tensor,
    classes: torch.Tensor,
    means: torch.Tensor,
    *,
    max_wide: int,
) -> None:
    """Write the differences of channels to their means as rows of codes, `-128` for those that are beyond.

    Args:
        codes: [num_channels, block_size] int8, class by class, within a class in the order of the channels, written.
        high_bytes: [num_rows[-1], block_size] int8, written; codes of the last class are the low bytes to these.
        integers: [1, num_channels, block_size] int16 or int32.
        num_rows: [num_classes] int64, channels of each class.
        classes: [num_channels] uint8.
        means: [num_channels] int16.
        max_wide: up to which magnitude a difference is written in the last class; in the others it is 127.
    """
    torch.ops.int8kv.split_channels(codes, high_bytes, integers, num_rows, classes, means, max_wide)


def restore_channels(
    integers: torch.Tensor,
    codes: torch.Tensor,
    high_bytes: torch.Tensor,
    num_rows: torch.Tensor,
    classes: torch.Tensor,
    means: torch.Tensor,
) -> None:
    """The inverse of `split_channels`: `integers` are written."""
    torch.ops.int8kv.restore_channels(integers, codes, high_bytes, num_rows, classes, means)


def quantize_channels(integers: torch.Tensor, vectors: torch.Tensor, steps: torch.Tensor) -> None:
    """Write vectors as multiples of the steps of their tokens, rounded half to even and saturated.

    Args:
        integers: [num_blocks, num_channels, block_size] int16 or int32, written; any stride between blocks.
        vectors: [num_blocks, block_size, num_channels] fp32.
        steps: [num_blocks, block_size] fp32; any stride between blocks.
    """
    torch.ops.int8kv.quantize_channels(integers, vectors, steps)


def dequantize_channels(integers: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Vectors of integers, as of `quantize_channels`."""
    num_blocks, num_channels, block_size = integers.shape
    vectors = torch.empty(num_blocks, block_size, num_channels)
    torch.ops.int8kv.dequantize_channels(vectors, integers, steps)
    return vectors


def pack_channels(
    plane: torch.Tensor, integers: torch.Tensor, head_size: int, *, bits: int, shift: int, of_values: bool
) -> None:
    """Write a plane of codes, see `cache.formats.BitPlane`.

    Args:
        plane: [num_blocks, num_kv_heads, bytes] int8, contiguous in the last.
        integers: [num_blocks, num_kv_heads * head_size, block_size] int16, codes, of which the lower byte is taken.
        bits: of a field of the plane: 8, 4, 2 or 1.
        shift: the lowest bit of a code that the plane holds.
        of_values: whether codes lie as those of V, else as those of K.
    """
    torch.ops.int8kv.pack_channels(plane, integers, head_size, bits, shift, of_values)


def unpack_channels(
    integers: torch.Tensor, plane: torch.Tensor, head_size: int, *, bits: int, shift: int, of_values: bool
) -> None:
    """The inverse of `pack_channels`; bits of integers below `shift` stay, those above become 0, or the sign of 8 bits.

    The planes of a code are to be unpacked in the order of their shifts.
    """
    torch.ops.int8kv.unpack_channels(integers, plane, head_size, bits, shift, of_values)

"""Operators on the integers of blocks, channel by channel: one typed wrapper each, on CPU.

The arguments are checked in `csrc/ops/store_ops.cpp`; a bad one raises RuntimeError naming the argument, what was
expected and what came. They run on the calling thread and do not hold the interpreter.
"""

import torch

from vllm_int8kv.cache import library as library  # loads the operators


def restore_channels(
    integers: torch.Tensor,
    codes: torch.Tensor,
    high_bytes: torch.Tensor,
    num_rows: torch.Tensor,
    classes: torch.Tensor,
    means: torch.Tensor,
) -> None:
    """Write rows of codes to their channels, each plus the mean of its channel.

    Args:
        integers: [1, num_channels, block_size] int16 or int32, written.
        codes: [num_channels, block_size] int8, class by class, within a class in the order of the channels.
        high_bytes: [num_rows[-1], block_size] int8; codes of the last class are the low bytes to these.
        num_rows: [num_classes] int64, channels of each class.
        classes: [num_channels] uint8.
        means: [num_channels] int16.
    """
    torch.ops.int8kv.restore_channels(integers, codes, high_bytes, num_rows, classes, means)


def dequantize_channels(integers: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Vectors `[num_blocks, block_size, num_channels]` fp32 of integers times the steps of their tokens.

    Args:
        integers: [num_blocks, num_channels, block_size] int16 or int32; any stride between blocks.
        steps: [num_blocks, block_size] fp32; any stride between blocks.
    """
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

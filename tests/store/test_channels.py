"""The operators on channels of stored blocks do what plain PyTorch does, with every instruction set."""

import pytest
import torch

from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import CODES
from vllm_int8kv.store.channels import (
    dequantize_channels,
    measure_channels,
    pack_channels,
    quantize_channels,
    restore_channels,
    split_channels,
    unpack_channels,
)

NUM_BLOCKS, NUM_KV_HEADS = 3, 2


@pytest.fixture(params=library.cpu_isas(), autouse=True)
def isa(request):
    before = library.cpu_isa()
    library.set_cpu_isa(request.param)
    yield
    library.set_cpu_isa(before)


def apart(integers: torch.Tensor) -> torch.Tensor:
    """The same with something between blocks, and behind the last one nothing that may be read."""
    padded = torch.full((len(integers), integers.shape[1] + 3, integers.shape[2]), 77, dtype=integers.dtype)
    padded[:, 3:] = integers
    return padded[:, 3:]


SHAPES = pytest.mark.parametrize(("num_channels", "block_size"), [(1, 1), (20, 30), (16, 16), (64, 40), (192, 128)])
DTYPES = pytest.mark.parametrize("dtype", [torch.int16, torch.int32])


@DTYPES
@SHAPES
def test_measure(num_channels, block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_BLOCKS, num_channels, block_size)
    integers = apart(torch.randint(-30000, 30000, shape, dtype=dtype, generator=generator))
    means = integers.double().mean(dim=2)
    rests = integers - means[..., None]
    expected = torch.stack([means, rests.square().mean(dim=2), rests.abs().amax(dim=2)], dim=1)
    torch.testing.assert_close(measure_channels(integers).double(), expected, rtol=1e-5, atol=1e-2)


@DTYPES
@SHAPES
def test_split_and_restore(num_channels, block_size, dtype):
    """Channels of class 3 are wide, those of the others have one difference that is beyond."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randint(-16384, 16384, (num_channels,), dtype=torch.int16, generator=generator)
    classes = torch.randint(0, 4, (num_channels,), dtype=torch.uint8, generator=generator)
    order = classes.argsort(stable=True)
    num_rows = classes.long().bincount(minlength=4)
    is_wide = classes == 3
    rests = torch.randint(-127, 128, (num_channels, block_size), generator=generator)
    rests[is_wide] = torch.randint(-16000, 16001, (int(num_rows[3]), block_size), generator=generator)
    integers = (rests + means[:, None]).to(dtype)[None]
    if dtype == torch.int32:
        integers[0, :, 0] = torch.where(means > 0, -(2**31), 2**31 - 1)
    else:
        integers[0, :, 0] = torch.where(means > 0, -17000, 17000)
    codes = torch.empty(num_channels, block_size, dtype=torch.int8)
    high_bytes = torch.empty(int(num_rows[3]), block_size, dtype=torch.int8)
    split_channels(codes, high_bytes, integers, num_rows, classes, means, max_wide=16000)
    rests[:, 0] = -128
    assert torch.equal(codes, rests[order].to(torch.int8))
    assert torch.equal(high_bytes, (rests[is_wide] - rests[is_wide].to(torch.int8) >> 8).to(torch.int8))
    restored = torch.empty_like(integers)
    restore_channels(restored, codes, high_bytes, num_rows, classes, means)
    assert torch.equal(restored[0], (rests + means[:, None]).to(dtype))


@DTYPES
@SHAPES
def test_quantize(num_channels, block_size, dtype):
    """As float64 rounds half to even, from halves to what does not fit."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(NUM_BLOCKS, 2 * block_size, generator=generator)[:, block_size:].exp2()
    exponents = torch.randint(-2, 40, (NUM_BLOCKS, block_size, num_channels), generator=generator)
    halves = torch.randint(-3, 4, exponents.shape, generator=generator) / 2
    quotients = torch.where(exponents < 10, halves, torch.randn(exponents.shape, generator=generator) * 2.0**exponents)
    vectors = quotients * steps[..., None]
    integers = apart(torch.zeros(NUM_BLOCKS, num_channels, block_size, dtype=dtype))
    quantize_channels(integers, vectors, steps)
    limit = 32767 if dtype == torch.int16 else 2**31 - 128
    expected = (vectors / steps[..., None]).double().round().clamp(-limit, limit)
    assert torch.equal(integers.double(), expected.transpose(1, 2))


@DTYPES
@SHAPES
def test_dequantize(num_channels, block_size, dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_BLOCKS, num_channels, block_size)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    integers = apart(torch.randint(low, high, shape, dtype=dtype, generator=generator))
    steps = torch.rand(NUM_BLOCKS, 2 * block_size, generator=generator)[:, block_size:]
    expected = integers.transpose(1, 2).float() * steps[..., None]
    assert torch.equal(dequantize_channels(integers, steps), expected)


@pytest.mark.parametrize("of_values", [False, True])
@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 128), (128, 32), (80, 48), (48, 16), (32, 32)])
def test_pack_and_unpack(head_size, block_size, bits, of_values):
    generator = torch.Generator().manual_seed(0)
    low, high = (-128, 128) if bits == 8 else (0, 2**bits)
    shape = (NUM_BLOCKS, NUM_KV_HEADS * head_size, block_size)
    codes = torch.randint(low, high, shape, generator=generator)
    own = codes.unflatten(1, (NUM_KV_HEADS, head_size)).mT.contiguous().to(torch.int8)
    expected = (CODES[bits].pack_v if of_values else CODES[bits].pack_k)(own)
    # Bits above those of a code are of no account, nor are bytes around the plane.
    integers = apart((codes + 256 * torch.randint(-128, 128, shape, generator=generator)).to(torch.int16))
    found = torch.full((NUM_BLOCKS, NUM_KV_HEADS, expected.shape[-1] + 32), 9, dtype=torch.int8)
    at, shift = 16, 0
    for plane in CODES[bits].planes:
        size = (plane.v_bytes if of_values else plane.k_bytes)(block_size, head_size)
        part = found[..., at : at + size]
        pack_channels(part, integers, head_size, bits=plane.bits, shift=shift, of_values=of_values)
        at, shift = at + size, shift + plane.bits
    assert torch.equal(found[..., 16:-16], expected)
    assert (found[..., :16] == 9).all() and (found[..., -16:] == 9).all()
    unpacked = apart(torch.full(shape, 99, dtype=torch.int16))
    at, shift = 16, 0
    for plane in CODES[bits].planes:
        size = (plane.v_bytes if of_values else plane.k_bytes)(block_size, head_size)
        place = {"bits": plane.bits, "shift": shift, "of_values": of_values}
        unpack_channels(unpacked, found[..., at : at + size], head_size, **place)
        at, shift = at + size, shift + plane.bits
    assert torch.equal(unpacked, codes.to(torch.int16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"integers": torch.zeros(1, 4, 8)}, "integers must be Short or Int, got Float"),
        (
            {"integers": torch.zeros(2, 4, 8, dtype=torch.int16)},
            r"integers must be of one block, got \[2, 4, 8\]",
        ),
        (
            {"integers": torch.zeros(4, 8, dtype=torch.int16)},
            r"integers must be .num_blocks, num_channels, block_size.",
        ),
        ({"integers": torch.zeros(1, 8, 4, dtype=torch.int16).mT}, "integers must be contiguous but for their blocks"),
        ({"codes": torch.zeros(4, 8)}, "codes must be Char, got Float"),
        ({"codes": torch.zeros(3, 8, dtype=torch.int8)}, r"codes must be \[4, block_size\] = \[4, 8\], got \[3, 8\]"),
        ({"high_bytes": torch.zeros(1, 8, dtype=torch.int8)}, r"of the last class, \[2, 8\], got \[1, 8\]"),
        ({"num_rows": torch.tensor([2, 0, 2])}, r"num_rows\[0\] must be that of the channels of class 0, 1, got 2"),
        ({"num_rows": torch.tensor([1, 1])}, "classes must be below 2, got 2"),
        ({"classes": torch.zeros(5, dtype=torch.uint8)}, r"classes must be \[num_channels\] = \[4\], got \[5\]"),
        ({"means": torch.zeros(3, dtype=torch.int16)}, r"means must be \[num_channels\] = \[4\], got \[3\]"),
    ],
)
def test_restore_refuses(change, message):
    arguments = {
        "integers": torch.zeros(1, 4, 8, dtype=torch.int16),
        "codes": torch.zeros(4, 8, dtype=torch.int8),
        "high_bytes": torch.zeros(2, 8, dtype=torch.int8),
        "classes": torch.tensor([2, 1, 2, 0], dtype=torch.uint8),
        "num_rows": torch.tensor([1, 1, 2]),
        "means": torch.zeros(4, dtype=torch.int16),
    }
    with pytest.raises(RuntimeError, match=message):
        restore_channels(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": torch.zeros(2, 7)}, r"steps must be \[num_blocks, block_size\] = \[2, 8\]"),
        ({"steps": torch.zeros(2, 8).double()}, "steps must be Float, got Double"),
        ({"steps": torch.zeros(8, 2).mT}, "contiguous in the latter"),
    ],
)
def test_dequantize_refuses(change, message):
    arguments = {"integers": torch.zeros(2, 4, 8, dtype=torch.int16), "steps": torch.zeros(2, 8)}
    with pytest.raises(RuntimeError, match=message):
        dequantize_channels(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plane": torch.zeros(1, 2, 32 * 16 // 2, dtype=torch.int8)}, "plane must be .* = .1, 2, 512."),
        (
            {"plane": torch.zeros(1, 1, 1, dtype=torch.int8).expand(1, 2, 512)},
            "plane must be .* contiguous in the last",
        ),
        ({"integers": torch.zeros(1, 64, 16, dtype=torch.int32)}, "integers must be Short, got Int"),
        ({"integers": torch.zeros(1, 64, 24, dtype=torch.int16)}, "block_size must be a multiple of 16, got 24"),
        ({"head_size": 24}, "head_size must be a multiple of 16 that divides num_channels, 64, got 24"),
        ({"bits": 3}, "bits must be 8, 4, 2 or 1, got 3"),
        ({"shift": 1}, "shift must leave the 8 bits within a byte, got 1"),
    ],
)
def test_pack_refuses(change, message):
    arguments = {
        "plane": torch.zeros(1, 2, 512, dtype=torch.int8),
        "integers": torch.zeros(1, 64, 16, dtype=torch.int16),
        "head_size": 32,
        "bits": 8,
        "shift": 0,
        "of_values": False,
    }
    with pytest.raises(RuntimeError, match=message):
        pack_channels(**arguments | change)


def test_others_refuse():
    """What they check beside what they share with their inverses."""
    integers = torch.zeros(2, 4, 8, dtype=torch.int16)
    for moments in (torch.zeros(2, 2, 4), torch.zeros(2, 3, 4).double()):
        with pytest.raises(RuntimeError, match="moments must be"):
            torch.ops.int8kv.measure_channels(moments, integers)
    with pytest.raises(RuntimeError, match=r"vectors must be .* = \[2, 8, 4\], got \[2, 4, 8\]"):
        quantize_channels(integers, torch.zeros(2, 4, 8), torch.zeros(2, 8))
    with pytest.raises(RuntimeError, match="integers is written and must not be expanded"):
        quantize_channels(integers[:1].expand(2, 4, 8), torch.zeros(2, 8, 4), torch.zeros(2, 8))
    rows = torch.zeros(4, 8, dtype=torch.int8), torch.zeros(0, 8, dtype=torch.int8)
    of_channels = torch.tensor([4, 0]), torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="max_wide must fit two bytes, 0 to 32767, got 40000"):
        split_channels(*rows, integers[:1], *of_channels, max_wide=40000)

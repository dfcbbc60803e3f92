"""Every byte of the cache is where csrc/format/cache_format.h says, computed here a second time, byte by byte."""

import struct
from contextlib import nullcontext

import pytest
import torch

from vllm_int8kv.cache import formats, library, ops
from vllm_int8kv.cache.formats import FORMATS, K8V8, SUPPORTED_HEAD_SIZES

SIZES = [(block_size, head_size) for block_size in (16, 32, 48, 128) for head_size in (32, 80, 128, 512)]
each_size = pytest.mark.parametrize("block_size, head_size", SIZES)


def random_planes(num_blocks: int, num_kv_heads: int, block_size: int, head_size: int) -> formats.Planes:
    codes = torch.randint(-128, 128, (2, num_blocks, num_kv_heads, block_size, head_size), dtype=torch.int8)
    scales = torch.randn(2, num_blocks, num_kv_heads, block_size).to(torch.bfloat16)
    return formats.Planes(codes[0], codes[1], scales[0], scales[1])


@each_size
def test_unpack_inverts_pack(block_size, head_size):
    planes = random_planes(3, 2, block_size, head_size)
    again = K8V8.unpack(K8V8.pack(planes))
    for name in ("k_codes", "v_codes", "k_scales", "v_scales"):
        assert torch.equal(getattr(again, name), getattr(planes, name)), name


@each_size
def test_pack_inverts_unpack(block_size, head_size):
    shape = (2, 3, block_size, 2 * head_size + 4)
    kv_cache = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(K8V8.pack(K8V8.unpack(kv_cache)), kv_cache)


@each_size
def test_bytes_are_where_cache_format_h_says(block_size, head_size):
    planes = random_planes(2, 3, block_size, head_size)
    chunk = K8V8.pack(planes)[1, 2].flatten()
    raw = bytes(chunk.view(torch.uint8).tolist())
    plane = block_size * head_size
    slots = {0, 1, 15, block_size // 2, block_size - 2, block_size - 1}
    dims = {0, 1, 2, 15, 16, head_size // 2 + 1, head_size - 1}
    for slot in slots:
        for dim in dims:
            k_offset = (slot // 16) * (16 * head_size) + (dim // 2) * 32 + (slot % 16) * 2 + dim % 2
            v_offset = plane + (dim // 16) * (16 * block_size) + (slot // 2) * 32 + (dim % 16) * 2 + slot % 2
            assert chunk[k_offset] == planes.k_codes[1, 2, slot, dim]
            assert chunk[v_offset] == planes.v_codes[1, 2, slot, dim]
        for scales, offset in ((planes.k_scales, 2 * plane), (planes.v_scales, 2 * plane + 2 * block_size)):
            (bits,) = struct.unpack_from("<H", raw, offset + 2 * slot)
            (value,) = struct.unpack("<f", struct.pack("<I", bits << 16))
            assert value == scales[1, 2, slot]


LOW_BITS = [name for name in FORMATS if name != "k8v8"]
each_format = pytest.mark.parametrize("cache_format", [FORMATS[name] for name in LOW_BITS], ids=LOW_BITS)


def random_low_bits(cache_format: formats.CacheFormat, block_size: int, head_size: int) -> formats.Planes:
    def codes(bits: int) -> torch.Tensor:
        low, high = (-128, 128) if bits == 8 else (0, 2**bits)
        return torch.randint(low, high, (2, 3, block_size, head_size)).to(torch.int8)

    k_scales, v_scales, k_midpoints, v_midpoints = torch.randn(4, 2, 3, block_size).to(torch.bfloat16)
    return formats.Planes(
        codes(cache_format.k_bits),
        codes(cache_format.v_bits),
        k_scales,
        v_scales,
        k_midpoints if cache_format.k_bits < 8 else None,
        v_midpoints if cache_format.v_bits < 8 else None,
    )


def bit_fields(bits: int) -> list[int]:
    """Bits of the planes of codes below 8 bits, the lowest first."""
    return {6: [4, 2], 5: [4, 1], 4: [4], 2: [2]}[bits]


def k_code(chunk: bytes, at: int, bits: int, block_size: int, head_size: int, slot: int, dim: int) -> tuple[int, int]:
    """A code of K whose planes start at byte `at` of a chunk, and where they end."""
    if bits == 8:
        byte = chunk[at + slot // 16 * 16 * head_size + dim // 2 * 32 + slot % 16 * 2 + dim % 2]
        return byte - 256 * (byte > 127), at + block_size * head_size
    code = lowest = 0
    for width in bit_fields(bits):
        fields = 8 // width
        padded = -(-head_size // (8 * fields)) * 8 * fields
        byte = chunk[
            at
            + slot // 16 * (16 * padded // fields)
            + dim // (8 * fields) * 128
            + dim % 8 // 2 * 32
            + slot % 16 * 2
            + dim % 2
        ]
        code |= (byte >> width * (dim % (8 * fields) // 8) & 2**width - 1) << lowest
        lowest, at = lowest + width, at + block_size * padded // fields
    return code, at


def v_code(chunk: bytes, at: int, bits: int, block_size: int, head_size: int, slot: int, dim: int) -> tuple[int, int]:
    """The same of V."""
    if bits == 8:
        byte = chunk[at + dim // 16 * 16 * block_size + slot // 2 * 32 + dim % 16 * 2 + slot % 2]
        return byte - 256 * (byte > 127), at + block_size * head_size
    code = lowest = 0
    for width in bit_fields(bits):
        fields = 8 // width
        padded = -(-head_size // (16 * fields)) * 16 * fields
        byte = chunk[at + dim // (16 * fields) * 16 * block_size + slot // 2 * 32 + dim % 16 * 2 + slot % 2]
        code |= (byte >> width * (dim % (16 * fields) // 16) & 2**width - 1) << lowest
        lowest, at = lowest + width, at + block_size * padded // fields
    return code, at


@each_format
@pytest.mark.parametrize("block_size, head_size", [(16, 32), (48, 80), (32, 128)])
def test_bits_are_where_codes_h_says(cache_format, block_size, head_size):
    planes = random_low_bits(cache_format, block_size, head_size)
    packed = cache_format.pack(planes)
    assert packed.shape[-1] == cache_format.content_bytes(head_size)
    chunk = packed[1, 2].flatten().view(torch.uint8).numpy().tobytes()
    sizes = (block_size, head_size)
    for slot in {0, 1, 15, block_size - 2, block_size - 1}:
        for dim in {0, 1, 7, 8, 15, 16, head_size // 2 + 1, head_size - 1}:
            code, at = k_code(chunk, 0, cache_format.k_bits, *sizes, slot, dim)
            assert code == planes.k_codes[1, 2, slot, dim]
            code, at = v_code(chunk, at, cache_format.v_bits, *sizes, slot, dim)
            assert code == planes.v_codes[1, 2, slot, dim]
        for name in ("k_scales", "k_midpoints", "v_scales", "v_midpoints"):
            if (values := getattr(planes, name)) is not None:
                assert at % 16 == 0
                (bits,) = struct.unpack_from("<H", chunk, at + 2 * slot)
                assert struct.unpack("<f", struct.pack("<I", bits << 16))[0] == values[1, 2, slot]
                at += 2 * block_size
        assert at == len(chunk)


@each_format
@each_size
def test_unpack_inverts_pack_of_few_bits(cache_format, block_size, head_size):
    planes = random_low_bits(cache_format, block_size, head_size)
    again = cache_format.unpack(cache_format.pack(planes), head_size)
    for name, expected in vars(planes).items():
        got = getattr(again, name)
        assert got is expected is None or torch.equal(got, expected), name


@pytest.mark.parametrize("name, at_64, at_128", [("k6v4", 2.90, 3.04), ("k4v4", 3.55, 3.75), ("k8v4", 2.50, 2.58)])
def test_capacity_against_bf16(name, at_64, at_128):
    for head_size, expected in ((64, at_64), (128, at_128)):
        native = formats.native_content_bytes(head_size, itemsize=2)
        assert native / FORMATS[name].content_bytes(head_size) >= expected


@pytest.mark.parametrize("head_size", formats.SUPPORTED_HEAD_SIZES)
def test_planes_and_chunks_start_on_16_bytes(head_size):
    for block_size in range(16, 257, 16):
        kv_cache = K8V8.allocate(2, 2, block_size, head_size)
        plane = block_size * head_size
        starts = (0, plane, 2 * plane, 2 * plane + 2 * block_size, kv_cache.stride(1), kv_cache.stride(0))
        assert all(start % 16 == 0 for start in starts)
        assert kv_cache.stride(1) == 2 * plane + 4 * block_size


def test_supported_head_sizes():
    assert list(formats.SUPPORTED_HEAD_SIZES) == [*range(32, 257, 16), 512]


@pytest.mark.parametrize("head_size, num_bytes", [(64, 132), (80, 164), (128, 260)])
def test_content_bytes(head_size, num_bytes):
    assert K8V8.content_bytes(head_size) == num_bytes
    assert K8V8.head_size_of(K8V8.allocate(1, 1, 16, head_size)) == head_size


def test_allocate(device):
    kv_cache = K8V8.allocate(4, 2, 32, 64, device)
    assert kv_cache.shape == (4, 2, 32, 132) and kv_cache.dtype == torch.int8
    assert kv_cache.device.type == device and kv_cache.is_contiguous() and not kv_cache.any()


@pytest.mark.parametrize("head_size", [-64, 0, 16, 72, 272, 1024])
def test_refuses_head_size(head_size):
    with pytest.raises(ValueError, match=f"head_size {head_size} is not supported; supported: 32 to 256"):
        K8V8.allocate(1, 1, 16, head_size)


@pytest.mark.parametrize("block_size", [-16, 0, 8, 24])
def test_refuses_block_size(block_size):
    with pytest.raises(ValueError, match=f"block_size must be a positive multiple of 16, got {block_size}"):
        K8V8.allocate(1, 1, block_size, 64)


@pytest.mark.parametrize(
    "shape, dtype, came",
    [((2, 16, 132), torch.int8, r"torch.int8 \[2, 16, 132\]"), ((1, 1, 16, 132), torch.uint8, "torch.uint8")],
)
def test_head_size_of_refuses_what_is_no_cache(shape, dtype, came):
    with pytest.raises(ValueError, match=f"kv_cache must be int8 .* got {came}"):
        K8V8.head_size_of(torch.zeros(shape, dtype=dtype))


def test_the_kernels_have_the_same_formats():
    assert library.cache_formats() == list(FORMATS)


@pytest.mark.parametrize("cache_format", FORMATS.values(), ids=FORMATS)
def test_the_kernels_take_the_same_head_sizes_and_bytes(cache_format):
    for head_size in range(8, 641, 8):
        content_bytes = cache_format.content_bytes(head_size)
        empty, slots = torch.zeros(0, 1, head_size), torch.zeros(0, dtype=torch.int64)
        for num_bytes in (content_bytes, content_bytes + 1):
            kv_cache = torch.zeros(1, 1, 16, num_bytes, dtype=torch.int8)
            if head_size not in SUPPORTED_HEAD_SIZES:
                expected = pytest.raises(
                    RuntimeError, match=f"head_size {head_size}, which is not supported; supported: "
                )
            elif num_bytes != content_bytes:
                expected = pytest.raises(RuntimeError, match=f"head_size {head_size} takes {content_bytes}")
            else:
                expected = nullcontext()
            with expected:
                ops.reshape_and_cache(empty, empty, kv_cache, slots, cache_format=cache_format)

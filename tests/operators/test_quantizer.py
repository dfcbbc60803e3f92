"""The numeric contract of csrc/format/quantizer.h, held against arithmetic in plain Python.

Every test of the quantizer runs on the reference and, through `reshape_and_cache`, on the kernel.
"""

import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_int8kv.cache import key_transform, ops, quantizer
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

HEAD_SIZE = 32
Quantize = Callable[[list[float]], tuple[list[int], float]]


def quantize_by_reference(row: list[float]) -> tuple[list[int], float]:
    quantized = quantizer.quantize(quantizer.sanitize(torch.tensor(row)))
    return quantized.codes.tolist(), float(quantized.scales)


def quantize_by_kernel(row: list[float]) -> tuple[list[int], float]:
    """Write the row as K and as V of slot 3, unrotated, and read both back."""
    kv_cache = K8V8.allocate(1, 1, 16, HEAD_SIZE)
    x = torch.tensor(row, dtype=torch.float32).reshape(1, 1, HEAD_SIZE)
    ops.reshape_and_cache(
        x, x, kv_cache, torch.tensor([3]), key_transform=KeyTransform(rotate=False), cache_format=K8V8
    )
    planes = K8V8.unpack(kv_cache)
    k, v = planes.k_codes[0, 0, 3].tolist(), planes.v_codes[0, 0, 3].tolist()
    assert k == v and planes.k_scales[0, 0, 3] == planes.v_scales[0, 0, 3]
    return v, float(planes.v_scales[0, 0, 3])


each_implementation = pytest.mark.parametrize(
    "quantize", [quantize_by_reference, quantize_by_kernel], ids=["reference", "kernel"]
)


def to_fp32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def to_bf16(x: float) -> float:
    """Round an fp32 value >= 0 to bf16 by choosing between its two neighbours."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    below = bits >> 16
    candidates = [struct.unpack("<f", struct.pack("<I", b << 16))[0] for b in (below, below + 1)]
    distances = [abs(c - x) for c in candidates]
    if distances[0] == distances[1]:
        return candidates[below % 2]
    return candidates[distances.index(min(distances))]


def expected(row: list[float]) -> tuple[list[int], float]:
    """fp32 division by way of double is correctly rounded: 53 >= 2 * 24 + 2 bits."""
    row = [0.0 if math.isnan(x) else min(max(x, -to_fp32(1e30)), to_fp32(1e30)) for x in row]
    amax = max(map(abs, row))
    scale = to_bf16(to_fp32(amax / 127)) if amax >= to_fp32(1e-30) else 1.0
    return [round(to_fp32(x / scale)) for x in row], scale


def padded(*values: float) -> list[float]:
    return [*values, *[0.0] * (HEAD_SIZE - len(values))]


HAND_MADE = {
    "ends": (padded(127.0, -127.0, 1.0), padded(127, -127, 1), 1.0),
    "half-to-even": (
        padded(127, 0.5, 1.5, 2.5, 125.5, 126.5, -0.5, -1.5, -2.5, -126.5),
        padded(127, 0, 2, 2, 126, 126, 0, -2, -2, -126),
        1.0,
    ),
    "off-half": (padded(254, 0.99, 1.01, 2.99, 3.01), padded(127, 0, 1, 1, 2), 2.0),
    "negative-maximum": (padded(-127 / 64, 1 / 64), padded(-127, 1), 1 / 64),
    "zeros": (padded(), padded(), 1.0),
    "minus-zero": ([-0.0] * HEAD_SIZE, padded(), 1.0),
    "nan-is-zero": (padded(math.nan, 127.0, -math.nan), padded(0, 127, 0), 1.0),
    "all-nan": ([math.nan] * HEAD_SIZE, padded(), 1.0),
    "infinity-saturates": (padded(math.inf, -math.inf, 1e20), padded(127, -127, 0), to_bf16(to_fp32(1e30 / 127))),
    "saturates": (padded(3e38, -1e31, 0.5e30), padded(127, -127, 63), to_bf16(to_fp32(1e30 / 127))),
    "subnormal-is-zero": (padded(1e-40, -5e-45), padded(), 1.0),
    "tiny-is-zero": (padded(0.99e-30), padded(), 1.0),
}


@each_implementation
@pytest.mark.parametrize("case", HAND_MADE)
def test_hand_made_rows(quantize: Quantize, case):
    row, codes, scale = HAND_MADE[case]
    assert quantize(row) == (codes, scale)


@each_implementation
def test_scale_is_rounded_half_to_even(quantize: Quantize):
    # amax / 127 = 1 + k / 256 lies between two bf16 numbers, which are 1/128 apart.
    for k in (1, 3, 5, 251):
        row = padded(127 * (1 + k / 256))
        assert quantize(row)[1] == 1 + round(k / 2) / 128


fp32 = st.floats(width=32)
near_one = st.floats(width=32, min_value=-4.0, max_value=4.0)
rows = st.one_of(*(st.lists(x, min_size=HEAD_SIZE, max_size=HEAD_SIZE) for x in (fp32, near_one)))
fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@each_implementation
@fuzz
@given(row=rows)
def test_equals_plain_python(quantize: Quantize, row):
    codes, scale = quantize(row)
    assert (codes, scale) == expected(row)
    assert min(codes) >= -127
    for x, code in zip(row, codes, strict=True):
        if math.isfinite(x) and abs(x) <= 1e30:
            # The quotient is rounded to fp32 first, so a tie may be off by an ulp of 127.
            assert abs(x - scale * code) <= scale / 2 * (1 + 2**-16)


def test_flushed_subnormals_change_nothing():
    row = padded(*(2.0**-k for k in range(100, 130)))
    want = expected(row)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        got = quantize_by_kernel(row)
    finally:
        torch.set_flush_denormal(False)
    assert got == want


ROTATION_BLOCKS = {32: 32, 48: 16, 64: 64, 80: 16, 96: 32, 112: 16, 128: 128, 192: 64, 224: 32, 256: 256, 512: 256}


def hadamard_matrix(head_size: int) -> torch.Tensor:
    """The rotation as a float64 matrix [head_size, head_size], by Kronecker products."""
    block = ROTATION_BLOCKS[head_size]
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.kron(h, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return torch.kron(torch.eye(head_size // block, dtype=torch.float64), h / math.sqrt(block))


@pytest.mark.parametrize("head_size", ROTATION_BLOCKS)
def test_rotation_is_the_hadamard_matrix(head_size):
    assert key_transform.rotation_block(head_size) == ROTATION_BLOCKS[head_size]
    x = torch.randn(7, 3, head_size)
    want = x.double() @ hadamard_matrix(head_size)
    torch.testing.assert_close(key_transform.hadamard_rotate(x), want.float())


@pytest.mark.parametrize("head_size", ROTATION_BLOCKS)
def test_rotation_is_orthonormal_and_its_own_inverse(head_size):
    matrix = key_transform.hadamard_rotate(torch.eye(head_size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_size))
    x = torch.randn(5, head_size)
    torch.testing.assert_close(key_transform.hadamard_rotate(key_transform.hadamard_rotate(x)), x)


@pytest.mark.parametrize("head_size", ROTATION_BLOCKS)
def test_rotation_keeps_scores(head_size):
    query, key = torch.randn(2, 6, head_size)
    rotated = key_transform.hadamard_rotate(query) @ key_transform.hadamard_rotate(key).T
    torch.testing.assert_close(rotated, query @ key.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_size", ROTATION_BLOCKS)
def test_kernel_rotates_by_the_hadamard_matrix(kernel, head_size):
    """A key along one axis is a row of the matrix: codes +-127 inside its block, in Sylvester's order, else 0."""
    kv_cache = K8V8.allocate(head_size // 16, 1, 16, head_size, kernel)
    axes = torch.eye(head_size, device=kernel)[:, None, :]
    ops.reshape_and_cache(axes, axes, kv_cache, torch.arange(head_size, device=kernel), cache_format=K8V8)
    planes = K8V8.unpack(kv_cache.cpu())
    assert torch.equal(planes.k_codes.reshape(head_size, head_size).sign(), hadamard_matrix(head_size).sign().char())
    assert set(planes.k_codes.abs().unique().tolist()) <= {0, 126, 127}
    step = 1 / math.sqrt(ROTATION_BLOCKS[head_size]) / 127
    assert set(planes.k_scales.tolist()[0][0]) == {to_bf16(to_fp32(step))}


@pytest.mark.parametrize("bits", [6, 5, 4, 2])
@pytest.mark.parametrize("shift", [0.0, 1.0, -30.0, 1e4])
def test_the_error_of_few_bits_is_bounded(bits, shift):
    """Half a step, and what half a unit of bf16 moves the ends by; of the midpoint, relative to the vector itself."""
    x = torch.randn(4000, 64) + shift
    quantized = quantizer.quantize(x, bits)
    if shift < 1e4:  # where bf16 cannot tell the middle, codes lie on one side of it
        assert quantized.codes.min() == 0 and quantized.codes.max() == 2**bits - 1
    error = (quantized.dequantize(bits, torch.float64) - x.double()).abs().amax(dim=-1)
    bound = quantized.scales.double() * (0.5 + (2**bits - 1) / 1024) + 1e-6 * x.abs().amax(dim=-1)
    assert (error <= bound).all()


@pytest.mark.parametrize("bits", [6, 5, 4, 2])
def test_vectors_without_extent_are_their_midpoint(bits):
    x = torch.tensor([0.0, 3.0, -1e-31, 1e30])[:, None].expand(4, 64)
    quantized = quantizer.quantize(x, bits)
    assert torch.equal(quantized.scales.float()[:3], torch.zeros(3)) and not quantized.codes[:3].any()
    assert torch.equal(quantized.dequantize(bits)[:3], quantized.midpoints.float()[:3, None].expand(3, 64))
    # 1e30 is no bf16: the rest is a step of its own.
    assert (quantized.dequantize(bits)[3] / 1e30 - 1).abs().max() < 1e-4

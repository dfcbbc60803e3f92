"""The ladder: every variant on every device gives the bits of the reference, and half a step of error at most."""

import pytest
import torch
from hostile import same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ladder_matrices import each_dtype, each_shape, matrix

from vllm_int8kv.cache import ladder, reference


def variants(device: str) -> tuple[str, ...]:
    return ladder.CUDA_VARIANTS if device == "cuda" else ladder.CPU_VARIANTS


def assert_equals_reference(x: torch.Tensor, variant: str) -> None:
    want, want_scales = reference.quantize_per_channel(x.cpu())
    codes, scales = ladder.quantize_per_channel(x, variant=variant)
    assert same_bits(codes.cpu(), want)
    assert same_bits(scales.cpu(), want_scales)
    if variant == "fused":
        return
    fixed = torch.rand(x.shape[1]) + 0.01
    codes, scales = ladder.quantize_per_channel(x, scales=fixed.to(x.device), variant=variant)
    assert same_bits(codes.cpu(), reference.quantize_per_channel(x.cpu(), scales=fixed)[0])
    assert same_bits(scales.cpu(), fixed)
    back = ladder.dequantize_per_channel(codes, scales, dtype=x.dtype, variant=variant)
    assert same_bits(back.cpu(), reference.dequantize_per_channel(codes.cpu(), fixed, dtype=x.dtype))


@each_dtype
@each_shape
def test_equals_the_reference(kernel, shape, dtype):
    for variant in variants(kernel):
        strided = matrix(*shape, dtype, kernel)
        assert_equals_reference(strided, variant)
        assert_equals_reference(strided.contiguous(), variant)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_threads_change_nothing(set_num_threads, num_threads):
    set_num_threads(num_threads)
    for shape in ((3, 70000), (2049, 130)):  # more threads than rows would have work for, and a rest
        assert_equals_reference(matrix(*shape, torch.float32), "vectorized")


def test_streamed_results_are_the_same(kernel):
    """From 8 MiB on results go past the caches; rows that are no whole cache lines do not."""
    for num_channels in (1024, 1040):
        x = torch.randn(8200, num_channels, device=kernel)
        for variant in ("simd", "vectorized") if kernel == "cpu" else variants(kernel):
            assert_equals_reference(x, variant)


@pytest.mark.parametrize("offset", [1, 3])
def test_odd_addresses(kernel, offset):
    storage = torch.randn(40 * 64 + offset, device=kernel)
    x = storage[offset:].view(40, 64)
    out = torch.empty(40 * 64 + offset, dtype=torch.int8, device=kernel)[offset:].view(40, 64)
    want, scales = reference.quantize_per_channel(x.cpu())
    for variant in variants(kernel):
        codes, found = ladder.quantize_per_channel(x, variant=variant, out=out.fill_(-128))
        assert codes.data_ptr() == out.data_ptr()
        assert same_bits(codes.cpu(), want) and same_bits(found.cpu(), scales)
        if variant != "fused":
            back = torch.empty_like(storage)[offset:].view(40, 64)
            ladder.dequantize_per_channel(codes, found, variant=variant, out=back)
            assert same_bits(back.cpu(), reference.dequantize_per_channel(want, scales, dtype=torch.float32))


HAND_MADE = {
    "ends": ([127.0, -127.0, 1.0], 1.0, [127, -127, 1]),
    "ties-to-even": ([254.0, 1.0, 3.0, -5.0], 2.0, [127, 0, 2, -2]),
    "zeros": ([0.0, -0.0], 1.0, [0, 0]),
    "tiny-is-zero": ([0.99e-30], 1.0, [0]),
    "nan-counts-as-zero": ([torch.nan, 127.0], 1.0, [0, 127]),
    "infinity-saturates": ([torch.inf, -torch.inf, 5e29], 1e30 / 127, [127, -127, 64]),
    "huge-saturates": ([3e38, -1e30], 1e30 / 127, [127, -127]),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_hand_made_channels(kernel, name):
    values, scale, codes = HAND_MADE[name]
    x = torch.tensor(values, device=kernel)[:, None]
    for variant in variants(kernel):
        found, scales = ladder.quantize_per_channel(x, variant=variant)
        assert found.flatten().tolist() == codes
        assert scales.item() == pytest.approx(scale, rel=1e-7)
    found, scales = reference.quantize_per_channel(x.cpu())
    assert found.flatten().tolist() == codes


def test_a_stale_scale_saturates(kernel):
    """The paper's CPU code converts to int8 before it clamps, and wraps."""
    x = torch.tensor([[300.0], [-300.0], [2e9], [torch.inf]], device=kernel)
    for variant in variants(kernel):
        if variant != "fused":
            codes, _ = ladder.quantize_per_channel(x, scales=torch.ones(1, device=kernel), variant=variant)
            assert codes.flatten().tolist() == [127, -127, 127, 127]


sizes = st.tuples(st.integers(1, 12), st.integers(1, 70))
values = st.one_of(st.floats(width=32), st.floats(width=32, min_value=-4, max_value=4))


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shape=sizes, data=st.data())
def test_any_matrix(shape, data):
    few = st.lists(values, min_size=1, max_size=24)
    x = torch.tensor(data.draw(few), dtype=torch.float32).repeat(shape[0] * shape[1])[: shape[0] * shape[1]]
    x = x.view(shape)
    for variant in ladder.CPU_VARIANTS:
        assert_equals_reference(x, variant)
    codes, scales = ladder.quantize_per_channel(x)
    error = (x.double() - codes.double() * scales.double()).abs()
    # The quotient is rounded to fp32 first, so a tie may be off by an ulp of 127.
    within = error <= scales.double() / 2 * (1 + 2**-16)
    assert within[x.isfinite() & (x.abs() <= 1e30)].all()


def args(device: str) -> dict:
    x = torch.randn(6, 20, device=device)
    codes, scales = ladder.quantize_per_channel(x)
    return {"x": x, "codes": codes, "scales": scales}


CODES_ERRORS = [
    ("x", lambda x: x[0], r"x must be \[num_tokens, num_channels\], got \[20\]"),
    ("x", lambda x: x.double(), "x must be Float, Half or BFloat16, got Double"),
    ("codes", lambda codes: codes.short(), "codes must be Char, got Short"),
    ("codes", lambda codes: codes[:5], r"codes must have the shape of x, \[6, 20\], got \[5, 20\]"),
    ("codes", lambda codes: codes.T.contiguous().T, "codes must be contiguous, got strides 1, 6"),
    ("scales", lambda scales: scales.half(), "scales must be Float, got Half"),
    ("scales", lambda scales: scales[:7], r"scales must be contiguous \[num_channels\] = \[20\], got \[7\]"),
    ("scales", lambda scales: scales[:, None], r"scales must be contiguous .*, got \[20, 1\]"),
]


@pytest.mark.parametrize("name, change, text", CODES_ERRORS, ids=[text for *_, text in CODES_ERRORS])
def test_refuses(device, name, change, text):
    good = args(device)
    bad = {**good, name: change(good[name])}
    with pytest.raises(RuntimeError, match=text):
        torch.ops.int8kv.quantize_per_channel(bad["x"], bad["codes"], bad["scales"], False, "vectorized")
    with pytest.raises(RuntimeError, match=text):
        torch.ops.int8kv.dequantize_per_channel(bad["x"], bad["codes"], bad["scales"], "vectorized")


def test_refuses_strides(device):
    good = args(device)
    x = good["x"].T.contiguous().T
    with pytest.raises(RuntimeError, match="x must be contiguous along num_channels, got stride 6"):
        ladder.quantize_per_channel(x)
    with pytest.raises(RuntimeError, match="x must be contiguous, got strides 1, 6"):
        ladder.dequantize_per_channel(good["codes"], good["scales"], out=x)


@pytest.mark.parametrize(
    "bad, text", [(0.0, "0"), (-1.0, "-1"), (torch.nan, "nan"), (torch.inf, "inf"), (1e-40, "9.99")]
)
def test_refuses_values_on_cpu(bad, text):
    good = args("cpu")
    good["scales"][3] = bad
    with pytest.raises(RuntimeError, match=rf"scales\[3\] must be positive, finite and not subnormal, got {text}"):
        ladder.quantize_per_channel(good["x"], scales=good["scales"])
    with pytest.raises(RuntimeError, match=rf"scales\[3\] must be positive, finite and not subnormal, got {text}"):
        ladder.dequantize_per_channel(good["codes"], good["scales"])


def test_refuses_a_variant():
    text = "variant 'fused' does not exist on CPU; supported: column_strided, row_major, tiled, simd, vectorized"
    with pytest.raises(RuntimeError, match=text):
        ladder.quantize_per_channel(torch.ones(2, 2), variant="fused")
    with pytest.raises(RuntimeError, match=text):
        ladder.dequantize_per_channel(torch.ones(2, 2, dtype=torch.int8), torch.ones(2), variant="fused")


def test_refuses_fused_without_scales_to_compute(cuda):
    codes, scales = ladder.quantize_per_channel(torch.ones(2, 2, device=cuda))
    with pytest.raises(RuntimeError, match="variant 'fused' computes the scales and takes none"):
        ladder.quantize_per_channel(torch.ones(2, 2, device=cuda), scales=scales, variant="fused")
    with pytest.raises(RuntimeError, match="variant 'fused' computes scales, dequantization has none"):
        ladder.dequantize_per_channel(codes, scales, variant="fused")


def test_opcheck(device):
    good = args(device)
    for compute_scales in (False, True):
        call = (good["x"], good["codes"], good["scales"], compute_scales, "vectorized")
        torch.library.opcheck(torch.ops.int8kv.quantize_per_channel.default, call)
    torch.library.opcheck(torch.ops.int8kv.dequantize_per_channel.default, (*good.values(), "vectorized"))


def test_fused_in_a_cuda_graph(cuda):
    """Every launch begins by clearing what its blocks tell each other, also when it is replayed."""
    x = torch.randn(5000, 96, device=cuda)
    ladder.quantize_per_channel(x, variant="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, scales = ladder.quantize_per_channel(x, variant="fused")
    for _ in range(3):
        x.normal_()
        graph.replay()
        want, want_scales = reference.quantize_per_channel(x.cpu())
        assert same_bits(codes.cpu(), want) and same_bits(scales.cpu(), want_scales)

"""The CUDA kernels of the ladder, run on the host thread by thread (cuda_emulation.h): same bits as the reference.

Blocks run one after another here, so the first one takes every ticket of the fused kernel; the order of the tickets
is tested by itself.
"""

import emulated_cuda
import pytest
import torch
from hostile import same_bits
from ladder_matrices import each_dtype, each_shape, matrix

from vllm_int8kv.cache import ladder, reference


@each_dtype
@each_shape
def test_emulated_kernels_equal_the_reference(kernels, shape, dtype):
    strided = matrix(*shape, dtype)
    fixed = torch.rand(shape[1]) + 0.01
    for mode, x in (((0, 0, 0, 3), strided), ((1, 1, 1, 2), strided.contiguous())):
        kernels.set_mode(*mode)
        want, want_scales = reference.quantize_per_channel(x)
        back = reference.dequantize_per_channel(want, want_scales, dtype=dtype)
        for variant in ladder.CUDA_VARIANTS:
            codes, scales = emulated_cuda.quantize_per_channel(kernels, x, variant=variant)
            assert same_bits(codes, want) and same_bits(scales, want_scales), variant
            if variant == "fused":
                continue
            codes, _ = emulated_cuda.quantize_per_channel(kernels, x, variant=variant, scales=fixed)
            assert same_bits(codes, reference.quantize_per_channel(x, scales=fixed)[0]), variant
            got = emulated_cuda.dequantize_per_channel(kernels, want, want_scales, dtype=dtype, variant=variant)
            assert same_bits(got, back), variant


@pytest.mark.parametrize("l2_bytes", [0, 1 << 16, 1 << 30], ids=["no-l2", "64-kib", "1-gib"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_emulated_fused_with_many_strips(kernels, l2_bytes, dtype):
    x = matrix(700, 600, dtype).contiguous()
    kernels.set_l2_bytes(l2_bytes)
    kernels.set_mode(0, 0, 1, 2)
    want, want_scales = reference.quantize_per_channel(x)
    codes, scales = emulated_cuda.quantize_per_channel(kernels, x, variant="fused")
    assert same_bits(codes, want) and same_bits(scales, want_scales)


@pytest.mark.parametrize("lag", [0, 1, 7, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (5000, 40), (300, 4096), (0, 70)], ids=str)
def test_tickets_cover_the_matrix_in_a_safe_order(kernels, shape, lag):
    """Each item once of each kind, and every maximum of a strip more than `lag` tickets before its first code."""
    tickets = emulated_cuda.queue_tickets(kernels, *shape, 4, 1 << 18, lag)
    amax = [item[:2] for item in tickets if item[2]]
    codes = [item[:2] for item in tickets if not item[2]]
    assert amax == codes == sorted(set(codes))
    num_strips = 1 + max(strip for strip, _ in codes)
    assert {strip for strip, _ in codes} == set(range(num_strips))
    margin = min(lag, len(codes) - len(codes) // num_strips)
    last_amax = {strip: number for number, (strip, _, is_amax) in enumerate(tickets) if is_amax}
    for number, (strip, _, is_amax) in enumerate(tickets):
        assert is_amax or number > last_amax[strip] + margin

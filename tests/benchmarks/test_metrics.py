"""The error metrics against closed forms, and against the mistake in the numbers of arXiv 2601.04719."""

import math

import numpy as np
import pytest
import torch

from benchmarks.ladder import metrics
from vllm_int8kv.cache import ladder, reference

SCALE = 1 / 127  # of U(-1, 1) with many tokens


def uniform(num_tokens: int, num_channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U(-1, 1), its round trip through the quantizer, and the scales."""
    x = 2 * torch.rand(num_tokens, num_channels) - 1
    codes, scales = ladder.quantize_per_channel(x)
    return x, ladder.dequantize_per_channel(codes, scales), scales


@pytest.mark.parametrize("num_channels", [64, 1024, 8192])
def test_errors_of_uniform_data(num_channels):
    x, approximation, scales = uniform(2048, num_channels)
    largest = metrics.max_abs_error(x, approximation)
    assert largest <= scales.max() / 2 * (1 + 2**-16)
    assert largest == pytest.approx(0.003937, rel=1e-3)
    rms_scale = scales.square().mean().sqrt().item()
    assert rms_scale == pytest.approx(SCALE, rel=2e-3)
    assert metrics.l2_error(x, approximation) == pytest.approx(math.sqrt(x.numel() / 12) * SCALE, rel=5e-3)
    assert metrics.relative_error(x, approximation) == pytest.approx(SCALE / 2, rel=5e-3)  # norms: sqrt(n / 3)

    query = 2 * torch.rand(16, num_channels) - 1
    errors = metrics.score_errors(query, x, approximation)
    closed_form = math.sqrt(2 / math.pi) * math.sqrt(num_channels / 3) * SCALE / math.sqrt(12)
    assert errors.plain == pytest.approx(closed_form, rel=0.04)
    assert errors.scaled == pytest.approx(0.00105, rel=0.04)  # the same for every width
    assert errors.plain < 0.1
    assert 0 < errors.softmax < errors.scaled / len(x) * 2


def test_float32_sums_of_squares_stop_growing():
    """The paper's L2 error of 131072 x 1024 is 16.589: there a sum in float32 no longer takes one more square."""
    x, approximation, _ = uniform(131072, 512)  # half of it; the other half has the same errors
    squares = (x - approximation).square().flatten().numpy()
    total = np.float32(0)
    for part in np.split(squares, 64) * 2:
        total = np.add.accumulate(np.concatenate([[total], part]), dtype=np.float32)[-1]
    assert math.sqrt(total) == pytest.approx(16.589, rel=1e-3)
    theory = math.sqrt(131072 * 1024 / 12) * SCALE
    assert theory == pytest.approx(26.33, rel=1e-3)
    assert metrics.l2_error(x, approximation) * math.sqrt(2) == pytest.approx(theory, rel=1e-3)


def test_errors_by_hand():
    x = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    approximation = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    assert metrics.l2_error(x, approximation) == 5
    assert metrics.max_abs_error(x, approximation) == 4
    assert metrics.relative_error(x, approximation) == 1
    assert metrics.relative_error(approximation, approximation) == 0
    assert metrics.relative_error(approximation, x) == math.inf
    errors = metrics.score_errors(torch.tensor([[1.0, 1.0]]), x, approximation)
    weights = math.exp(3 / math.sqrt(2)), math.exp(-4 / math.sqrt(2))
    assert errors.plain == 3.5
    assert errors.scaled == pytest.approx(3.5 / math.sqrt(2))
    assert errors.softmax == pytest.approx(weights[0] / sum(weights) - 0.5)


def test_parts_change_nothing(monkeypatch):
    x, approximation = torch.randn(2, 50, 3, 7)
    whole = metrics.l2_error(x, approximation), metrics.max_abs_error(x, approximation)
    monkeypatch.setattr(metrics, "CHUNK_ELEMENTS", 10)
    assert metrics.l2_error(x, approximation) == pytest.approx(whole[0], rel=1e-12)
    assert metrics.max_abs_error(x, approximation) == whole[1]
    assert metrics.l2_error(x[:0], x[:0]) == metrics.max_abs_error(x[:0], x[:0]) == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"approximation must have the shape of x, \[2, 3\], got \[3, 2\]"):
        metrics.l2_error(torch.zeros(2, 3), torch.zeros(3, 2))


def test_kv_errors():
    query, key, value = torch.randn(40, 4, 32), torch.randn(40, 2, 32), torch.randn(40, 2, 32)
    same = metrics.kv_errors(query, key, value, key, value, softmax_scale=0.2)
    assert same == metrics.KVErrors(0, 0, 0, 0)

    errors = metrics.kv_errors(query, key, value, key, 1.1 * value, softmax_scale=0.2)
    assert (errors.e_k, errors.e_a) == (0, 0)
    assert errors.e_v == pytest.approx(0.1, rel=1e-5) and errors.e_o == pytest.approx(0.1, rel=1e-5)

    wrong_key, wrong_value = key + 0.1 * torch.randn_like(key), value + 0.2 * torch.randn_like(value)
    errors = metrics.kv_errors(query, key, value, wrong_key, wrong_value, softmax_scale=0.2)
    mask = reference.visible_keys(torch.arange(40), 40, causal=True, sliding_window=None)
    want, got = (
        reference.attention(query.double(), k.double(), v.double(), mask, softmax_scale=0.2)[0]
        for k, v in ((key, value), (wrong_key, wrong_value))
    )
    assert errors.e_o == pytest.approx(((want - got).norm() / want.norm()).item(), rel=1e-9)
    assert errors.e_k == pytest.approx(((key - wrong_key).norm() / key.norm()).item(), rel=1e-5)
    assert errors.e_v == pytest.approx(((value - wrong_value).norm() / value.norm()).item(), rel=1e-5)


def test_attention_error_by_hand():
    """Two tokens; the first sees itself only, the second gives both the same weight until a key is wrong."""
    query, key, value = torch.ones(2, 1, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)
    wrong = torch.tensor([0.0, math.log(3.0)]).view(2, 1, 1)
    errors = metrics.kv_errors(query, key, value, wrong, value, softmax_scale=1.0)
    assert errors.e_k == math.inf
    assert errors.e_a == pytest.approx(math.sqrt(2 * 0.25**2 / 1.5))  # 1/2, 1/2 become 1/4, 3/4
    assert errors.e_o == 0

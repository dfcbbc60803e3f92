"""The factors that balance keys and queries: exact, optimal by their own formula, and blind to moved outliers."""

import pytest
import torch

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.equalization import calibration_positions, key_equalizer
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

NUM_TOKENS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 128, 6, 2, 64


@pytest.fixture
def tensors():
    """Q, K and V; channels of Q and K have different sizes."""
    query = torch.randn(NUM_TOKENS, NUM_HEADS, HEAD_SIZE) * torch.exp(torch.randn(HEAD_SIZE))
    key = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE) * torch.exp(torch.randn(NUM_KV_HEADS, HEAD_SIZE))
    return query, key, torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE)


def attention_error(query, key, value, *, equalizer, rotate=True):
    """Relative error of attention through the INT8 cache against exact attention."""
    num_blocks = NUM_TOKENS // 16
    kv_cache = K8V8.allocate(num_blocks, NUM_KV_HEADS, 16, HEAD_SIZE, "cpu")
    options = {"key_transform": KeyTransform(rotate=rotate, equalizer=equalizer)}
    ops.reshape_and_cache(key, value, kv_cache, torch.arange(NUM_TOKENS), **options, cache_format=K8V8)
    out = ops.paged_attention(
        query,
        kv_cache,
        torch.arange(num_blocks, dtype=torch.int32)[None],
        torch.tensor([NUM_TOKENS], dtype=torch.int32),
        torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
        softmax_scale=HEAD_SIZE**-0.5,
        **options,
        cache_format=K8V8,
    )
    mask = reference.visible_keys(torch.arange(NUM_TOKENS), NUM_TOKENS, causal=True, sliding_window=None)
    exact, _ = reference.attention(query, key, value, mask, softmax_scale=HEAD_SIZE**-0.5)
    return reference.relative_error(out, exact), kv_cache, out


@pytest.mark.parametrize("num_positions", [1, 2, 100, 257, 300, 2048, 4096, 131072])
def test_calibration_positions_are_different_and_reach_far(num_positions):
    positions = calibration_positions(num_positions)
    assert len(positions) == min(256, num_positions)
    assert positions[0] == 0 and (positions.diff() > 0).all()
    if len(positions) > 1:
        assert positions[-1] == min(num_positions, 4096) - 1


def test_factors_are_powers_of_two_near_the_optimum(tensors):
    query, key, _ = tensors
    factors = key_equalizer(query, key)
    assert factors.shape == (NUM_KV_HEADS, HEAD_SIZE) and factors.dtype == torch.float32
    assert (torch.frexp(factors).mantissa == 0.5).all()

    def expected_error(f):  # the left side of the inequality in equalization.py
        k = (key.square().mean(dim=0) / f.square()).sum(dim=-1)
        q = (query.square().mean(dim=0).view(NUM_KV_HEADS, -1, HEAD_SIZE).mean(dim=1) * f.square()).sum(dim=-1)
        return k * q

    bound = (key.square().mean(dim=0) * query.square().mean(dim=0).view(2, -1, HEAD_SIZE).mean(dim=1)).sqrt()
    bound = bound.sum(dim=-1).square()
    # A factor of sqrt(2) off changes a term by at most (2 + 1/2) / 2, both ways.
    assert (expected_error(factors) <= 1.25 * bound).all()
    assert (expected_error(torch.ones_like(factors)) > 1.5 * bound).all()


@pytest.mark.parametrize("rotate_keys", [True, False], ids=["rotated", "not_rotated"])
def test_equalized_attention_is_more_accurate(tensors, rotate_keys):
    query, key, value = tensors
    plain, _, _ = attention_error(query, key, value, equalizer=None, rotate=rotate_keys)
    equalized, _, _ = attention_error(query, key, value, equalizer=key_equalizer(query, key), rotate=rotate_keys)
    assert equalized < 0.8 * plain


@pytest.mark.parametrize("factor", [2.0**-4, 128.0, 2.0**12])
def test_an_outlier_moved_from_q_to_k_changes_no_bit(tensors, factor):
    query, key, value = tensors
    _, kv_cache, out = attention_error(query, key, value, equalizer=key_equalizer(query, key))
    key[..., [5, 37]] *= factor
    query[..., [5, 37]] /= factor
    _, stressed_cache, stressed_out = attention_error(query, key, value, equalizer=key_equalizer(query, key))
    assert torch.equal(stressed_cache, kv_cache)
    assert torch.equal(stressed_out, out)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_channels_without_a_size_are_left_alone(tensors, value):
    query, key, _ = tensors
    key[..., 3] = value
    query[..., 4] = value
    factors = key_equalizer(query, key)
    assert (factors[:, 3:5] == 1).all() and (factors > 0).all() and factors.isfinite().all()


def test_extreme_sizes_stay_in_range(tensors):
    query, key, _ = tensors
    factors = key_equalizer(query * 1e-30, key * 1e30)
    assert factors.max() == 2.0**30

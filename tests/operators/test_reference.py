"""The reference itself, held against PyTorch's own attention and against loops over scalars."""

import math

import pytest
import torch
from hostile import make_batch

from vllm_int8kv.cache import reference
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

SCALE = 0.125


def scalar_attention(
    query: list[float],
    keys: list[list[float]],
    values: list[list[float]],
    position: int,
    *,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slope: float = 0.0,
    sink: float | None = None,
) -> tuple[list[float], float]:
    """One row of attention, written down term by term: (out [head_size], lse)."""
    scores = {}
    for j, key in enumerate(keys):
        if causal and j > position:
            continue
        if sliding_window is not None and abs(position - j) >= sliding_window:
            continue
        score = sum(q * k for q, k in zip(query, key, strict=True)) * SCALE
        if softcap:
            score = softcap * math.tanh(score / softcap)
        scores[j] = score + alibi_slope * (j - position)
    total = sum(map(math.exp, scores.values())) + (0.0 if sink is None else math.exp(sink))
    if total == 0.0:
        return [0.0] * len(query), -math.inf
    weights = {j: math.exp(score) / total for j, score in scores.items()}
    return [sum(w * values[j][d] for j, w in weights.items()) for d in range(len(query))], math.log(total)


OPTIONS = {
    "causal": {},
    "non-causal": {"causal": False},
    "window-1": {"sliding_window": 1},
    "window-4": {"sliding_window": 4},
    "non-causal-window": {"causal": False, "sliding_window": 4},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": [0.25, 0.5, 0.1, 0.7]},
    "sinks": {"sinks": [0.5, -1.0, 3.0, 0.0]},
    "all": {"sliding_window": 5, "softcap": 2.0, "alibi_slopes": [0.1] * 4, "sinks": [1.0, 2.0, 3.0, 4.0]},
}


@pytest.mark.parametrize("query_len, seq_len", [(1, 1), (1, 9), (5, 9), (9, 9)])
@pytest.mark.parametrize("option", OPTIONS)
def test_attention_equals_a_loop_over_scalars(option, query_len, seq_len):
    options = dict(OPTIONS[option])
    slopes, sinks = options.pop("alibi_slopes", [0.0] * 4), options.pop("sinks", [None] * 4)
    query = torch.randn(query_len, 4, 3, dtype=torch.float64)
    key, value = torch.randn(2, seq_len, 2, 3, dtype=torch.float64)
    positions = torch.arange(seq_len - query_len, seq_len)
    mask = reference.visible_keys(positions, seq_len, options.get("causal", True), options.get("sliding_window"))
    out, lse = reference.attention(
        query,
        key,
        value,
        mask,
        softmax_scale=SCALE,
        softcap=options.get("softcap", 0.0),
        alibi_slopes=torch.tensor(slopes) if any(slopes) else None,
        sinks=None if sinks[0] is None else torch.tensor(sinks),
    )
    for row in range(query_len):
        for head in range(4):
            want_out, want_lse = scalar_attention(
                query[row, head].tolist(),
                key[:, head // 2].tolist(),
                value[:, head // 2].tolist(),
                int(positions[row]),
                alibi_slope=slopes[head],
                sink=sinks[head],
                **options,
            )
            assert out[row, head].tolist() == pytest.approx(want_out, rel=1e-6, abs=1e-9)
            assert float(lse[head, row]) == pytest.approx(want_lse, rel=1e-6)


@pytest.mark.parametrize("sink", [None, 1.25])
def test_a_query_that_sees_nothing(sink):
    query, key = torch.randn(2, 4, 2, 8, dtype=torch.float64)
    positions = torch.arange(-3, 1)  # more queries than keys
    mask = reference.visible_keys(positions, 1, causal=False, sliding_window=2)
    assert mask.flatten().tolist() == [False, False, True, True]
    sinks = None if sink is None else torch.full((2,), sink)
    out, lse = reference.attention(query, key[:1], key[:1], mask, softmax_scale=SCALE, sinks=sinks)
    assert not out[:2].any() and out[2:].all()
    assert (lse[:, :2] == (-math.inf if sink is None else sink)).all()


def sdpa(batch, seq: int, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    """PyTorch's attention of one sequence, [query_len, num_heads, head_size] float64."""
    query = batch.query[batch.rows(seq)].double().transpose(0, 1)
    key, value = key.double().transpose(0, 1), value.double().transpose(0, 1)
    rows, columns = query.shape[1], key.shape[1]
    mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows) if causal else None
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    return out.transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_heads, num_kv_heads, head_size, block_size", [(8, 2, 64, 16), (9, 3, 80, 48)])
def test_paged_attention_equals_sdpa_on_the_dequantized_cache(causal, num_heads, num_kv_heads, head_size, block_size):
    batch = make_batch(
        [(1, 50), (7, 16), (20, 33)],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        key_transform=KeyTransform(rotate=False),
    )
    out, _ = reference.paged_attention(
        *batch.args, softmax_scale=SCALE, causal=causal, key_transform=KeyTransform(rotate=False), cache_format=K8V8
    )
    planes = K8V8.unpack(batch.kv_cache)
    for seq, seq_len in enumerate(batch.seq_lens.tolist()):
        slots = [(int(batch.block_table[seq, i // block_size]), i % block_size) for i in range(seq_len)]
        key = torch.stack([planes.k_codes[b, :, s] * planes.k_scales[b, :, s, None].double() for b, s in slots])
        value = torch.stack([planes.v_codes[b, :, s] * planes.v_scales[b, :, s, None].double() for b, s in slots])
        torch.testing.assert_close(out[batch.rows(seq)], sdpa(batch, seq, key, value, causal))
    assert not out[batch.num_tokens :].any()


@pytest.mark.parametrize("equalize", [False, True])
@pytest.mark.parametrize("rotate_keys", [False, True])
def test_rotation_and_equalizer_cancel(rotate_keys, equalize):
    """What is left against attention on the unquantized K and V is small: both sides are transformed alike."""
    key_equalizer = 0.25 + 2 * torch.rand(2, 64) if equalize else None
    options = {"key_transform": KeyTransform(rotate=rotate_keys, equalizer=key_equalizer)}
    batch = make_batch([(1, 40), (12, 12)], **options)
    out, _ = reference.paged_attention(*batch.args, softmax_scale=SCALE, **options, cache_format=K8V8)
    for seq in range(2):
        want = sdpa(batch, seq, batch.keys[seq], batch.values[seq], causal=True)
        error = (out[batch.rows(seq)] - want).square().mean().sqrt()
        assert error < 0.02


def test_masks_against_xformers():
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="needs xformers, of the bench extra")
    query_lens, seq_lens = [1, 7, 16, 5], [33, 7, 48, 9]
    bias = attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(query_lens, seq_lens)
    wanted = bias.materialize((sum(query_lens), sum(seq_lens))) == 0
    masks = []
    for query_len, seq_len in zip(query_lens, seq_lens, strict=True):
        positions = torch.arange(seq_len - query_len, seq_len)
        masks.append(reference.visible_keys(positions, seq_len, causal=True, sliding_window=None))
    assert torch.equal(torch.block_diag(*masks).bool(), wanted)

"""What each operator means, in plain PyTorch: readable and slow. The kernels are tested against it."""

import math
from typing import Any

import torch

from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.cache.quantizer import INT8_MAX, MIN_MAGNITUDE, sanitize


def quantize_per_channel(x: torch.Tensor, *, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `ops.quantize_per_channel`."""
    if scales is None:
        amax = sanitize(x).abs().amax(dim=0) if len(x) else torch.zeros(x.shape[1], device=x.device)
        scales = torch.where(amax >= MIN_MAGNITUDE, amax / INT8_MAX, 1.0)
    steps = torch.nan_to_num(x.float() / scales, nan=0.0)
    return torch.round(steps.clamp(-INT8_MAX, INT8_MAX)).to(torch.int8), scales


def dequantize_per_channel(codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """Meaning of `ops.dequantize_per_channel`."""
    return (codes.float() * scales).to(dtype)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
) -> None:
    """Meaning of `ops.reshape_and_cache`."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    blocks, offsets = slots // kv_cache.shape[2], slots % kv_cache.shape[2]
    planes = cache_format.unpack(kv_cache, key.shape[-1])
    keys = cache_format.quantize_k(key_transform.keys(key[kept]))
    values = cache_format.quantize_v(cache_format.transform_values(value[kept]))
    for into, new in ((planes.keys, keys), (planes.values, values)):
        into.codes[blocks, :, offsets] = new.codes
        into.scales[blocks, :, offsets] = new.scales
        if into.midpoints is not None:
            into.midpoints[blocks, :, offsets] = new.midpoints
    kv_cache.copy_(cache_format.pack(planes))


def dequantize(
    kv_cache: torch.Tensor, dtype: torch.dtype, *, cache_format: CacheFormat, head_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as they are stored, transformed, each `[num_blocks, num_kv_heads, block_size, head_size]`."""
    planes = cache_format.unpack(kv_cache, head_size)
    return planes.keys.dequantize(cache_format.k_bits, dtype), planes.values.dequantize(cache_format.v_bits, dtype)


def gather_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    *,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
) -> None:
    """Meaning of `ops.gather_cache`."""
    bounds = cu_seq_lens.tolist()
    for seq, start in enumerate(seq_starts.tolist()):
        rows = slice(bounds[seq], bounds[seq + 1])
        slots = torch.arange(start, start + rows.stop - rows.start, device=kv_cache.device)
        blocks = block_table[seq, slots // kv_cache.shape[2]].long()
        # The planes of whole blocks, one block per row, then each row's slot of it.
        keys, values = (
            x[torch.arange(len(slots), device=x.device), :, slots % kv_cache.shape[2]]
            for x in dequantize(kv_cache[blocks], torch.float32, cache_format=cache_format, head_size=key.shape[-1])
        )
        key[rows] = key_transform.undo_keys(keys).to(key.dtype)
        value[rows] = cache_format.undo_values(values).to(value.dtype)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|, L2: of an attention output, e_o of KVTuner with norms in place of elementwise ratios."""
    return ((got - want).norm() / want.norm()).item()


def visible_keys(
    query_positions: torch.Tensor, num_keys: int, causal: bool, sliding_window: int | None
) -> torch.Tensor:
    """Mask `[len(query_positions), num_keys]`, True where a query may look."""
    distance = query_positions[:, None] - torch.arange(num_keys, device=query_positions.device)[None, :]
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if sliding_window is not None:
        mask &= distance.abs() < sliding_window
    return mask


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights of one sequence, in the dtype of `query`.

    Args:
        query: [query_len, num_heads, head_size].
        key: [seq_len, num_kv_heads, head_size].
        mask: [query_len, seq_len], True where a query may look.
        positions: [query_len], where the queries stand; None for the last of the sequence.

    Returns:
        weights `[num_heads, query_len, seq_len]`, zeros where a query sees nothing, and lse
        `[num_heads, query_len]`, natural log.
    """
    query_len, num_heads, _ = query.shape
    seq_len, num_kv_heads, _ = key.shape
    key = key.repeat_interleave(num_heads // num_kv_heads, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * softmax_scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        if positions is None:
            positions = torch.arange(seq_len - query_len, seq_len, device=query.device)
        distance = torch.arange(seq_len, device=query.device)[None, :] - positions[:, None]
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * distance
    scores = scores.masked_fill(~mask, -math.inf)
    if sinks is not None:
        sink_column = sinks.to(scores.dtype)[:, None, None].expand(num_heads, query_len, 1)
        lse = torch.logsumexp(torch.cat([scores, sink_column], dim=-1), dim=-1)
    else:
        lse = torch.logsumexp(scores, dim=-1)
    return torch.where(torch.isneginf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None])), lse


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence; the arguments are those of `attention_weights`, and `value` is like `key`.

    Returns:
        out `[query_len, num_heads, head_size]`, zeros where a query sees nothing, and lse
        `[num_heads, query_len]`, natural log.
    """
    weights, lse = attention_weights(query, key, mask, **options)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return torch.einsum("hqk,khd->qhd", weights, value), lse


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Meaning of `ops.paged_attention`: attention over the dequantized cache, computed in `dtype`.

    Returns:
        out `[num_tokens, num_heads, head_size]` and lse `[num_heads, num_tokens]`, both in `dtype`; rows of
        padding tokens are 0 and -inf.
    """
    transformed = key_transform.queries(query, kv_cache.shape[1]).to(dtype)
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    lse = torch.full((query.shape[1], query.shape[0]), -math.inf, dtype=dtype, device=query.device)
    bounds = query_start_loc.tolist()
    for seq, seq_len in enumerate(seq_lens.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        num_blocks = -(-seq_len // kv_cache.shape[2])
        blocks = kv_cache[block_table[seq, :num_blocks].long()]
        stored = dequantize(blocks, dtype, cache_format=cache_format, head_size=query.shape[-1])
        key, value = (x.transpose(1, 2).flatten(0, 1)[:seq_len] for x in stored)
        positions = torch.arange(seq_len - (end - begin), seq_len, device=query.device)
        out[begin:end], lse[:, begin:end] = attention(
            transformed[begin:end],
            key,
            value,
            visible_keys(positions, seq_len, causal, sliding_window),
            softmax_scale=softmax_scale,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
    return cache_format.undo_values(out), lse

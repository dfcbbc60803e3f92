"""A `VarlenAttention` in plain PyTorch, in place of a library."""

import torch

from vllm_int8kv import reference


def plain_attention(
    query,
    key,
    value,
    *,
    out,
    query_start_loc,
    cu_seq_lens,
    max_query_len,
    max_seq_len,
    softmax_scale,
    causal,
    window,
    softcap,
    alibi_slopes,
):
    """Computes in float64 and checks what a library relies on."""
    lse = torch.full((query.shape[1], query.shape[0]), torch.nan, device=query.device)
    query_bounds, key_bounds = query_start_loc.tolist(), cu_seq_lens.tolist()
    assert query_bounds[-1] == len(query) == len(out) and key_bounds[-1] == len(key) == len(value)
    for seq in range(len(query_bounds) - 1):
        rows, keys = (slice(*bounds[seq : seq + 2]) for bounds in (query_bounds, key_bounds))
        query_len, seq_len = rows.stop - rows.start, keys.stop - keys.start
        assert query_len <= max_query_len and seq_len <= max_seq_len
        positions = torch.arange(seq_len - query_len, seq_len, device=query.device)
        distance = positions[:, None] - torch.arange(seq_len, device=query.device)
        mask = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            mask &= distance >= 0
        for side, sign in zip(window, (1, -1), strict=True):
            if side >= 0:
                mask &= sign * distance <= side
        assert mask.any(dim=1).all(), "a library may return anything for a query that sees no key"
        options = {"softmax_scale": softmax_scale, "softcap": softcap, "alibi_slopes": alibi_slopes}
        attended, lse[:, rows] = reference.attention(
            *(x.double() for x in (query[rows], key[keys], value[keys])), mask, **options
        )
        out[rows] = attended.to(out.dtype)
    return lse

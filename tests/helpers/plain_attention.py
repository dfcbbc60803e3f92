"""A `VarlenAttention` in plain PyTorch, in place of a library."""

import torch

from vllm_int8kv.cache import reference
from vllm_int8kv.serving.varlen_attention import VarlenCall


def plain_attention(call: VarlenCall) -> torch.Tensor:
    """Computes in float64 and checks what a library relies on."""
    lse = torch.full((call.query.shape[1], call.query.shape[0]), torch.nan, device=call.query.device)
    query_bounds, key_bounds = call.query_start_loc.tolist(), call.cu_seq_lens.tolist()
    assert query_bounds[-1] == len(call.query) == len(call.out) and key_bounds[-1] == len(call.key) == len(call.value)
    for seq in range(len(query_bounds) - 1):
        rows, keys = (slice(*bounds[seq : seq + 2]) for bounds in (query_bounds, key_bounds))
        query_len, seq_len = rows.stop - rows.start, keys.stop - keys.start
        assert query_len <= call.max_query_len and seq_len <= call.max_seq_len
        positions = torch.arange(seq_len - query_len, seq_len, device=call.query.device)
        distance = positions[:, None] - torch.arange(seq_len, device=call.query.device)
        mask = torch.ones_like(distance, dtype=torch.bool)
        if call.causal:
            mask &= distance >= 0
        for side, sign in zip(call.window, (1, -1), strict=True):
            if side >= 0:
                mask &= sign * distance <= side
        assert mask.any(dim=1).all(), "a library may return anything for a query that sees no key"
        options = {"softmax_scale": call.softmax_scale, "softcap": call.softcap, "alibi_slopes": call.alibi_slopes}
        attended, lse[:, rows] = reference.attention(
            *(x.double() for x in (call.query[rows], call.key[keys], call.value[keys])), mask, **options
        )
        call.out[rows] = attended.to(call.out.dtype)
    return lse

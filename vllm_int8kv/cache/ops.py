"""The operators on the cache: one typed wrapper each. Needs neither vLLM nor a GPU.

The arguments are checked in `csrc/ops/cache_ops.cpp`; a bad one raises RuntimeError naming the argument, what was
expected and what came.
"""

import torch

from vllm_int8kv.cache import library as library  # loads the operators
from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
    cpu_isa: str | None = None,
) -> None:
    """Quantize this step's keys and values and write them to their slots.

    Each (token, KV head) vector gets its own scale, so no calibration is needed and tokens never affect
    one another. Slots not named in `slot_mapping` keep their bytes.

    Args:
        key, value: [num_tokens, num_kv_heads, head_size], fp32, fp16 or bf16; any token and head stride.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] int8, written in place.
        slot_mapping: [num_tokens] int64. Negative entries are padding and are skipped; two equal
            non-negative entries are the caller's mistake and leave one of the two vectors.
        cache_format: of `kv_cache`, whose bytes are checked against it.
        key_transform: what is done to K first; whoever reads the cache must be told the same.
        cpu_isa: CPU kernels of this call, one of `library.cpu_isas()`; None for those of the process. Every one writes
            the same bytes.
    """
    torch.ops.int8kv.reshape_and_cache(
        key, value, kv_cache, slot_mapping, *_common(cache_format, key_transform), cpu_isa or ""
    )


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
    """Dequantize stretches of sequences, for attention libraries that know no INT8 cache.

    Every device gives the same bits: codes times scales, plus midpoints below 8 bits, the rotation undone, of K times
    the equalizer, in fp32, rounded once.

    Args:
        key, value: [num_rows, num_kv_heads, head_size], fp32, fp16 or bf16, written; any token and head stride.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] int8.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        cu_seq_lens: [num_seqs + 1] int32, prefix sum of the lengths of the stretches: the rows of each sequence.
            Later rows are left alone.
        seq_starts: [num_seqs] int32, position within its sequence of a stretch's first token.
        cache_format, key_transform: as in `reshape_and_cache`.
    """
    torch.ops.int8kv.gather_cache(
        key, value, kv_cache, block_table, cu_seq_lens, seq_starts, *_common(cache_format, key_transform)
    )


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
    out: torch.Tensor | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    cpu_isa: str | None = None,
    arrivals: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of this step's queries over the INT8 cache, which already holds this step's K and V.

    A batch may mix prefill, chunked prefill, decode and multi-token verification. On CPU the bits of a row depend
    neither on what else is in the batch, nor on the number of threads, nor on how its prompt was chunked. On a GPU
    equal lengths of all sequences give equal bits.

    Args:
        query: [num_tokens, num_heads, head_size], fp32, fp16 or bf16; any token and head stride.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] int8.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        seq_lens: [num_seqs] int32, tokens in the cache including this step's.
        query_start_loc: [num_seqs + 1] int32, prefix sum of the query lengths; later tokens are padding.
        softmax_scale: what the scores are multiplied by, usually 1 / sqrt(head_size).
        cache_format, key_transform: as in `reshape_and_cache`.
        out: written and returned, like `query` in shape and dtype; rows of padding tokens are left alone.
        sliding_window: a query sees keys less than this far away; None for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: [num_heads] fp32, times (key position - query position) is added to the scores.
        sinks: [num_heads] fp32, one more score per head that attends to nothing.
        return_lse: also return the log-sum-exp of the scores.
        cpu_isa: as in `reshape_and_cache`.
        arrivals: from `prepare_paged_attention`, not for two calls that may run at the same time; None: a launch more.

    Returns:
        out, or (out, lse) with lse [num_heads, num_tokens] fp32, natural log. A row that sees no key is 0
        with lse -inf (the sink, if there is one).
    """
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be None (no window) or at least 1, got {sliding_window}")
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = None
    if return_lse:
        shape = (query.shape[1], query.shape[0])
        lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=query.device)
    torch.ops.int8kv.paged_attention(
        out,
        query,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        lse,
        alibi_slopes,
        sinks,
        *_common(cache_format, key_transform),
        softmax_scale,
        causal,
        0 if sliding_window is None else sliding_window,
        softcap,
        cpu_isa or "",
        arrivals,
    )
    return out if lse is None else (out, lse)


def prepare_paged_attention(
    query: torch.Tensor, kv_cache: torch.Tensor, *, cache_format: CacheFormat
) -> torch.Tensor | None:
    """Load every kernel that `paged_attention` may choose, as no capture of a CUDA graph must be the first to use one.

    Args:
        query, kv_cache: as in `paged_attention`, of any number of tokens and blocks, none included.

    Returns:
        What calls of `paged_attention` on one stream count their thread blocks with, zeros that they leave as zeros:
        [3 * thread blocks] int32 on the device of the cache. None on a CPU.
    """
    count = torch.ops.int8kv.prepare_paged_attention(query, kv_cache, cache_format.name)
    return torch.zeros(count, dtype=torch.int32, device=kv_cache.device) if count else None


def _common(cache_format: CacheFormat, key_transform: KeyTransform) -> tuple[str, bool, torch.Tensor | None]:
    """The arguments that the schemas of all operators share, in their order."""
    return cache_format.name, key_transform.rotate, key_transform.equalizer

"""The operators: one typed wrapper each. Needs neither vLLM nor a GPU.

The arguments are checked in `csrc/ops.cpp`; a bad one raises RuntimeError naming the argument, what was
expected and what came.
"""

from importlib.util import find_spec

import torch

# Found by name, because an editable install keeps the library away from this file.
_library = find_spec("vllm_int8kv._C")
if _library is None or _library.origin is None:
    raise ImportError("vllm_int8kv._C is missing: install vllm-int8kv with pip, or run `make setup` in a checkout")
torch.ops.load_library(_library.origin)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    rotate_keys: bool = True,
    key_equalizer: torch.Tensor | None = None,
) -> None:
    """Quantize this step's keys and values and write them to their slots.

    Each (token, KV head) vector gets its own scale, so no calibration is needed and tokens never affect
    one another. Slots not named in `slot_mapping` keep their bytes.

    Args:
        key, value: [num_tokens, num_kv_heads, head_size], fp32, fp16 or bf16; any token and head stride.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] int8, written in place.
        slot_mapping: [num_tokens] int64. Negative entries are padding and are skipped; two equal
            non-negative entries are the caller's mistake and leave one of the two vectors.
        rotate_keys: multiply K by a Hadamard matrix first; `paged_attention` must be told the same.
        key_equalizer: [num_kv_heads, head_size] fp32, K is divided by it before the rotation.
    """
    torch.ops.int8kv.reshape_and_cache(key, value, kv_cache, slot_mapping, rotate_keys, key_equalizer)


def gather_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    seq_starts: torch.Tensor,
    *,
    rotate_keys: bool = True,
    key_equalizer: torch.Tensor | None = None,
) -> None:
    """Dequantize stretches of sequences, for attention libraries that know no INT8 cache.

    Every device gives the same bits: codes times scales, the rotation undone, times the equalizer, in fp32, rounded
    once.

    Args:
        key, value: [num_rows, num_kv_heads, head_size], fp32, fp16 or bf16, written; any token and head stride.
        kv_cache: [num_blocks, num_kv_heads, block_size, content_bytes] int8.
        block_table: [num_seqs, max_blocks_per_seq] int32.
        cu_seq_lens: [num_seqs + 1] int32, prefix sum of the lengths of the stretches: the rows of each sequence.
            Later rows are left alone.
        seq_starts: [num_seqs] int32, position within its sequence of a stretch's first token.
        rotate_keys, key_equalizer: as in `reshape_and_cache`.
    """
    torch.ops.int8kv.gather_cache(
        key, value, kv_cache, block_table, cu_seq_lens, seq_starts, rotate_keys, key_equalizer
    )


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    *,
    softmax_scale: float,
    out: torch.Tensor | None = None,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    rotate_keys: bool = True,
    key_equalizer: torch.Tensor | None = None,
    return_lse: bool = False,
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
        out: written and returned, like `query` in shape and dtype; rows of padding tokens are left alone.
        sliding_window: a query sees keys less than this far away; None for all.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        alibi_slopes: [num_heads] fp32, times (key position - query position) is added to the scores.
        sinks: [num_heads] fp32, one more score per head that attends to nothing.
        rotate_keys, key_equalizer: as in `reshape_and_cache`.
        return_lse: also return the log-sum-exp of the scores.

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
        key_equalizer,
        softmax_scale,
        causal,
        0 if sliding_window is None else sliding_window,
        softcap,
        rotate_keys,
    )
    return out if lse is None else (out, lse)


CPU_VARIANTS = ("column_strided", "row_major", "tiled", "simd", "vectorized")
"""The ladder on CPU: the paper's loop order, a plain loop, tiles, vectors, vectors on all threads of PyTorch."""

CUDA_VARIANTS = ("naive", "tiled", "coarsened", "vectorized", "fused")
"""The ladder on CUDA, as in the paper; `fused` also finds the scales, in one launch, and has no inverse."""


def quantize_per_channel(
    x: torch.Tensor,
    *,
    scales: torch.Tensor | None = None,
    variant: str = "vectorized",
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize every channel of a matrix symmetrically with one scale: static caches, offline compression.

    `codes = round_half_even(x / scales)`, saturated at +-127; NaN becomes 0. The error is at most half a
    scale where `scales` come from `x`. Every variant gives the same bits.

    Args:
        x: [num_tokens, num_channels], fp32, fp16 or bf16; any token stride.
        scales: [num_channels] fp32, positive and not subnormal; None takes `max|x| / 127` per channel, where
            NaN counts as 0, magnitudes saturate at 1e30 and a channel below 1e-30 everywhere gets scale 1.
        variant: one of `CPU_VARIANTS` or `CUDA_VARIANTS`, by the device of `x`.
        out: [num_tokens, num_channels] int8, contiguous; receives the codes.

    Returns:
        codes [num_tokens, num_channels] int8 and scales [num_channels] fp32.
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device) if out is None else out
    compute_scales = scales is None
    if scales is None:
        scales = torch.empty(x.shape[-1:], dtype=torch.float32, device=x.device)
    torch.ops.int8kv.quantize_per_channel(x, codes, scales, compute_scales, variant)
    return codes, scales


def dequantize_per_channel(
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    variant: str = "vectorized",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`codes * scales`, multiplied in fp32 and rounded half to even to `dtype`.

    Args:
        codes: [num_tokens, num_channels] int8, contiguous.
        scales: [num_channels] fp32.
        dtype: fp32, fp16 or bf16; that of `out` if there is one.
        variant: as for `quantize_per_channel`, without `fused`.
        out: [num_tokens, num_channels], contiguous; receives the result.
    """
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
    torch.ops.int8kv.dequantize_per_channel(x, codes, scales, variant)
    return x


def cpu_isas() -> list[str]:
    """The CPU kernel paths this machine can run, slowest first: scalar, avx2, avx2_vnni, avx512, avx512_vnni."""
    return torch.ops.int8kv.cpu_isas().split(",")


def cpu_isa() -> str:
    """The CPU kernel path in use; the fastest of `cpu_isas` unless `set_cpu_isa` chose another."""
    return torch.ops.int8kv.cpu_isa()


def set_cpu_isa(isa: str) -> None:
    """Use another CPU kernel path in this process. Raises RuntimeError if the CPU does not have it."""
    torch.ops.int8kv.set_cpu_isa(isa)


def has_cuda_kernels() -> bool:
    """Whether the installed library was built with CUDA kernels."""
    return torch.ops.int8kv.has_cuda_kernels()

"""FlashAttention as it is found on this machine, for `prefill.py`: vLLM's own, or the one inside PyTorch."""

from typing import Protocol

import torch

MIN_COMPUTE_CAPABILITY = (8, 0)
MAX_HEAD_SIZE = 256


class VarlenAttention(Protocol):
    """Attention over contiguous keys and values of several sequences, by somebody else's kernel.

    Where `causal`, queries are the last tokens of their keys. `window` is (left, right), -1 for none, counted from
    that diagonal. Writes `out` and returns lse, [num_heads, num_tokens] fp32, natural log.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        out: torch.Tensor,
        query_start_loc: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        softmax_scale: float,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: torch.Tensor | None,
    ) -> torch.Tensor: ...


def find(
    device_type: str, dtype: torch.dtype, head_size: int, *, alibi: bool = False, softcap: bool = False
) -> VarlenAttention | None:
    """The fastest kernel for a layer, or None: not on a GPU, an older one than Ampere, fp32, a large head size."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size > MAX_HEAD_SIZE:
        return None
    if torch.cuda.get_device_capability() < MIN_COMPUTE_CAPABILITY:
        return None
    found = _from_vllm(head_size, alibi, softcap)
    if found is not None or softcap:
        return found
    return _torch_attention


def _from_vllm(head_size: int, alibi: bool, softcap: bool) -> VarlenAttention | None:
    """vLLM's FlashAttention 2, 3 or 4, by the choice of its own backend; None without vLLM for CUDA."""
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        return None
    version = get_flash_attn_version(requires_alibi=alibi, head_size=head_size, requires_softcap=softcap)
    if version is None:
        return None

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        out: torch.Tensor,
        query_start_loc: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        softmax_scale: float,
        causal: bool,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        _, lse = flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            max_seqlen_q=max_query_len,
            cu_seqlens_q=query_start_loc,
            max_seqlen_k=max_seq_len,
            cu_seqlens_k=cu_seq_lens,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=list(window),
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_softmax_lse=True,
            out=out,
            fa_version=version,
        )
        return lse

    return attention


def _torch_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    out: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> torch.Tensor:
    """What `torch.nn.attention.varlen` calls, FlashAttention 2; its Python side knows no ALiBi."""
    if softcap:
        raise ValueError(f"PyTorch's FlashAttention has no softcap, got {softcap}")
    left, right = (None if side < 0 else side for side in window)
    attended, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        query_start_loc,
        cu_seq_lens,
        max_query_len,
        max_seq_len,
        0.0,  # no dropout
        causal,
        False,
        scale=softmax_scale,
        window_size_left=left,
        window_size_right=right,
        alibi_slopes=alibi_slopes,
    )
    out.copy_(attended)
    return lse

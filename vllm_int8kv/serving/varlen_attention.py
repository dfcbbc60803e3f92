"""FlashAttention as it is found on this machine, for `prefill.py`: vLLM's own, or the one inside PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

FLASH_MIN_COMPUTE_CAPABILITY = (8, 0)
MAX_HEAD_SIZE = 256


@dataclass(frozen=True)
class VarlenCall:
    """Attention over contiguous keys and values of several sequences."""

    query: torch.Tensor
    """[num_tokens, num_heads, head_size]; where `causal`, the last tokens of their sequence's keys"""
    key: torch.Tensor
    """[num_rows, num_kv_heads, head_size]"""
    value: torch.Tensor
    out: torch.Tensor
    """like `query`, written"""
    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32, the tokens of each sequence"""
    cu_seq_lens: torch.Tensor
    """[num_seqs + 1] int32, the rows of each sequence"""
    max_query_len: int
    max_seq_len: int
    softmax_scale: float
    causal: bool
    window: tuple[int, int]
    """keys seen to the left and to the right of the diagonal, -1 for all"""
    softcap: float
    alibi_slopes: torch.Tensor | None


VarlenAttention = Callable[[VarlenCall], torch.Tensor]
"""Somebody else's kernel: writes `out` and returns lse, [num_heads, num_tokens] fp32, natural log."""


def find(
    device_type: str, dtype: torch.dtype, head_size: int, *, alibi: bool = False, softcap: bool = False
) -> VarlenAttention | None:
    """The fastest kernel for a layer, or None: not on a GPU, an older one than Ampere, fp32, a large head size."""
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_size > MAX_HEAD_SIZE:
        return None
    if torch.cuda.get_device_capability() < FLASH_MIN_COMPUTE_CAPABILITY:
        return None
    found = _from_vllm(head_size, alibi, softcap)
    if found is not None or alibi or softcap:
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

    def attention(call: VarlenCall) -> torch.Tensor:
        _, lse = flash_attn_varlen_func(
            q=call.query,
            k=call.key,
            v=call.value,
            max_seqlen_q=call.max_query_len,
            cu_seqlens_q=call.query_start_loc,
            max_seqlen_k=call.max_seq_len,
            cu_seqlens_k=call.cu_seq_lens,
            softmax_scale=call.softmax_scale,
            causal=call.causal,
            window_size=list(call.window),
            softcap=call.softcap,
            alibi_slopes=call.alibi_slopes,
            return_softmax_lse=True,
            out=call.out,
            fa_version=version,
        )
        return lse

    return attention


def _torch_attention(call: VarlenCall) -> torch.Tensor:
    """What `torch.nn.attention.varlen` calls, FlashAttention 2, built without ALiBi."""
    if call.softcap:
        raise ValueError(f"PyTorch's FlashAttention has no softcap, got {call.softcap}")
    if call.alibi_slopes is not None:
        raise ValueError("PyTorch's FlashAttention is built without ALiBi, got alibi_slopes")
    left, right = (None if side < 0 else side for side in call.window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        call.query,
        call.key,
        call.value,
        call.query_start_loc,
        call.cu_seq_lens,
        call.max_query_len,
        call.max_seq_len,
        0.0,  # no dropout
        call.causal,
        False,
        scale=call.softmax_scale,
        window_size_left=left,
        window_size_right=right,
    )
    call.out.copy_(out)
    return lse

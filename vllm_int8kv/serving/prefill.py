"""Attention of prompts on a GPU: keys and values are dequantized into a workspace and given to FlashAttention.

`ops.paged_attention` reads the cache once per 16 query rows, which is what decode wants. A prompt has thousands of
rows per key, where only the library's kernels reach the speed of the tensor cores, and dequantizing each key once is
cheap: with 32 query heads, 8 KV heads and head_size 128, a chunk of 2048 tokens over 32768 keys takes 1.1 TFLOP and
0.2 GB through memory.

Fresh tokens are read back from the cache like all others, as the CPU does: what a token attends to does not depend on
how its prompt was chunked or on prefix-cache hits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.serving.varlen_attention import VarlenAttention, VarlenCall

MAX_DECODE_QUERY_LEN = 16
"""Query tokens of a sequence that `ops.paged_attention` takes in one pass over its keys; more make a prompt."""

MAX_CONTEXT_ROWS = 32768
"""Rows of the workspace, beside those of a step's own tokens; longer contexts go through it in splits."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring sequences of a batch and the keys [begin, end) of each that one call attends."""

    first_seq: int
    keys: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        return sum(end - begin for begin, end in self.keys)


def split_batch(
    query_lens: Sequence[int], seq_lens: Sequence[int], first_keys: Sequence[int], max_rows: int
) -> list[list[Stretch]]:
    """Cut a batch so that every call's keys fit the workspace.

    Args:
        query_lens, seq_lens: per sequence; its queries are its last tokens.
        first_keys: the first key that any query of a sequence sees.
        max_rows: of the workspace.

    Returns:
        Groups of neighbouring sequences. A group has one stretch with all its keys, or it is one sequence with more
        than `max_rows` of them: then its stretches end with the one that holds all its queries.

    Raises:
        ValueError: a sequence has more queries than the workspace has rows.
    """
    groups: list[list[Stretch]] = []
    open_rows = max_rows  # of the last group; full, so that the first sequence begins one
    for seq, (query_len, seq_len, first) in enumerate(zip(query_lens, seq_lens, first_keys, strict=True)):
        if query_len > max_rows:
            raise ValueError(f"sequence {seq} has {query_len} query tokens, the prefill workspace {max_rows} rows")
        num_keys = seq_len - first
        if num_keys > max_rows:
            ends = range(seq_len, first, -max_rows)
            groups.append([Stretch(seq, ((max(first, end - max_rows), end),)) for end in reversed(ends)])
            open_rows = max_rows
        elif open_rows + num_keys > max_rows:
            groups.append([Stretch(seq, ((first, seq_len),))])
            open_rows = num_keys
        else:
            stretch = groups[-1][0]
            groups[-1] = [Stretch(stretch.first_seq, (*stretch.keys, (first, seq_len)))]
            open_rows += num_keys
    return groups


@dataclass(frozen=True)
class Split:
    """One call of the attention library."""

    cu_seq_lens: torch.Tensor
    """[num_seqs + 1] int32, rows of the workspace"""
    seq_starts: torch.Tensor
    """[num_seqs] int32, as `ops.gather_cache` takes them"""
    num_rows: int
    max_seq_len: int


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences that are attended together, in one split or, for a single long one, in several."""

    seqs: slice
    """of the batch"""
    tokens: slice
    """rows of `query`"""
    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32, counted from the group's first token"""
    max_query_len: int
    splits: tuple[Split, ...]


@dataclass(frozen=True)
class PrefillPlan:
    """How the prompts of a step are attended; the same for all layers of a KV cache group."""

    num_decodes: int
    """sequences before the prompts, and their tokens: they are decoded"""
    num_decode_tokens: int
    groups: tuple[SequenceGroup, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the workspace that are used."""
        return max(split.num_rows for group in self.groups for split in group.splits)

    @property
    def has_long_sequences(self) -> bool:
        """Whether a sequence goes through the workspace in several splits, which share no mask."""
        return any(len(group.splits) > 1 for group in self.groups)


def make_plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    *,
    num_decodes: int,
    sliding_window: int | None,
    max_rows: int,
    device: torch.device,
) -> PrefillPlan:
    """Plan the sequences from `num_decodes` on.

    Args:
        query_start_loc, seq_lens: of the whole batch, on the host; further `seq_lens` are padding.
        sliding_window: of the KV cache group: keys that no query sees may have been given back.
    """
    query_lens = [end - begin for begin, end in pairwise(query_start_loc[num_decodes:])]
    seq_lens = seq_lens[num_decodes : len(query_start_loc) - 1]
    first_keys = [0] * len(query_lens)
    if sliding_window is not None:
        lens = zip(query_lens, seq_lens, strict=True)
        first_keys = [max(0, seq_len - query_len - sliding_window + 1) for query_len, seq_len in lens]

    def to_device(values: Sequence[int]) -> torch.Tensor:
        on_host = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
        return on_host.to(device, non_blocking=True)

    groups = []
    for stretches in split_batch(query_lens, seq_lens, first_keys, max_rows):
        first = num_decodes + stretches[0].first_seq
        seqs = slice(first, first + len(stretches[0].keys))
        begins = query_start_loc[seqs.start : seqs.stop + 1]
        splits = [
            Split(
                cu_seq_lens=to_device([0, *accumulate(end - begin for begin, end in stretch.keys)]),
                seq_starts=to_device([begin for begin, _ in stretch.keys]),
                num_rows=stretch.num_rows,
                max_seq_len=max(end - begin for begin, end in stretch.keys),
            )
            for stretch in stretches
        ]
        groups.append(
            SequenceGroup(
                seqs=seqs,
                tokens=slice(begins[0], begins[-1]),
                query_start_loc=to_device([begin - begins[0] for begin in begins]),
                max_query_len=max(end - begin for begin, end in pairwise(begins)),
                splits=tuple(splits),
            )
        )
    return PrefillPlan(num_decodes, query_start_loc[num_decodes], tuple(groups))


def attend(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: PrefillPlan,
    workspace: tuple[torch.Tensor, torch.Tensor],
    attention: VarlenAttention,
    *,
    softmax_scale: float,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
    out: torch.Tensor,
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of the planned sequences over the cache, which already holds this step's K and V.

    Args:
        query, out: [num_tokens, num_heads, head_size], of the whole batch; other rows are left alone.
        kv_cache, block_table: as in `ops.paged_attention`, of the whole batch.
        workspace: keys and values, each [at least the plan's rows, num_kv_heads, head_size] in the dtype of `query`.
        attention: the library's kernel.
        softmax_scale to sinks: as in `ops.paged_attention`.

    Raises:
        ValueError: a sequence longer than the workspace with a window or ALiBi, which count from the diagonal.
    """
    if plan.has_long_sequences and (sliding_window is not None or alibi_slopes is not None):
        raise ValueError("a sequence that takes the workspace more than once must have neither a window nor ALiBi")
    window = (-1, -1)
    if sliding_window is not None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    for group in plan.groups:
        rows = group.tokens
        lse = None
        for split in group.splits:
            key, value = (x[: split.num_rows] for x in workspace)
            place = (block_table[group.seqs], split.cu_seq_lens, split.seq_starts)
            ops.gather_cache(
                key,
                value,
                kv_cache,
                *place,
                cache_format=cache_format,
                key_transform=key_transform,
            )
            call = VarlenCall(
                query=query[rows],
                key=key,
                value=value,
                out=out[rows] if lse is None else torch.empty_like(out[rows]),
                query_start_loc=group.query_start_loc,
                cu_seq_lens=split.cu_seq_lens,
                max_query_len=group.max_query_len,
                max_seq_len=split.max_seq_len,
                softmax_scale=softmax_scale,
                causal=causal and split is group.splits[-1],  # all keys of the others come before the queries
                window=window,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
            )
            split_lse = attention(call)
            lse = split_lse if lse is None else _merge(out[rows], lse, call.out, split_lse)
        if sinks is not None:  # a score more in the sum, which attends to nothing
            out[rows] *= torch.sigmoid(lse - sinks[:, None]).t()[..., None].to(out.dtype)


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Make `out` attention over the keys of both; returns the lse of both."""
    total = torch.logaddexp(lse, other_lse)
    weights = ((x - total).exp().t()[..., None] for x in (lse, other_lse))
    out.copy_(out * next(weights) + other * next(weights))
    return total

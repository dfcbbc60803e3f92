"""Inputs that punish a kernel for looking where it must not, and the tolerance for one that does not.

Blocks lie in random order with unused ones between them; unused slots hold NaN scales and random codes (-128
too); the block table names block 2^31 - 1 past its used part; query rows of padding tokens are NaN; the cache is
a window into a larger random tensor, with gaps between blocks and a storage offset.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.formats import K8V8, CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

NO_BLOCK = 2**31 - 1
NUM_PADDING_TOKENS = 3


@dataclass(frozen=True, eq=False)  # compared by identity, so that what is computed from one can be cached
class Batch:
    """One step's arguments of `paged_attention`."""

    query: torch.Tensor
    """[num_tokens + 3, num_heads, head_size]; the last three tokens are padding"""
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    """per sequence [seq_len, num_kv_heads, head_size] fp32, as they were before quantization"""
    values: tuple[torch.Tensor, ...]
    cache_format: CacheFormat = K8V8

    @property
    def args(self) -> tuple[torch.Tensor, ...]:
        return self.query, self.kv_cache, self.block_table, self.seq_lens, self.query_start_loc

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.query_start_loc[-1])

    def rows(self, seq: int) -> slice:
        """The tokens of one sequence."""
        begin, end = self.query_start_loc[seq : seq + 2].tolist()
        return slice(begin, end)

    def piece(self, seq: int, begin: int, end: int) -> "Batch":
        """A batch of one sequence with its query tokens [begin, end): what a chunk of its prefill sees."""
        rows = self.rows(seq)
        unseen = rows.stop - rows.start - end
        return replace(
            self,
            query=self.query[rows][begin:end],
            block_table=self.block_table[seq : seq + 1],
            seq_lens=self.seq_lens[seq : seq + 1] - unseen,
            query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32, device=self.query.device),
        )

    def alone(self, seq: int) -> "Batch":
        """A batch of one sequence."""
        rows = self.rows(seq)
        return self.piece(seq, 0, rows.stop - rows.start)

    def freed_before_window(self, window: int) -> "Batch":
        """The same with blocks no query can see replaced by an unused one, as vLLM frees them."""
        block_size = self.kv_cache.shape[2]
        block_table = self.block_table.clone()
        used = block_table[block_table != NO_BLOCK].tolist()
        unused = next(block for block in range(self.kv_cache.shape[0]) if block not in used)
        for seq, seq_len in enumerate(self.seq_lens.tolist()):
            rows = self.rows(seq)
            first_visible = seq_len - (rows.stop - rows.start) - window + 1
            block_table[seq, : max(first_visible, 0) // block_size] = unused
        return replace(self, block_table=block_table)


def garbage_cache(
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    device: str = "cpu",
    cache_format: CacheFormat = K8V8,
) -> torch.Tensor:
    """A cache of NaN scales and random codes, a strided view with a storage offset."""
    shape = (num_blocks, num_kv_heads, block_size, cache_format.content_bytes(head_size))
    random = cache_format.unpack(torch.randint(-128, 128, shape, dtype=torch.int8), head_size)
    params = {
        name: torch.full_like(x, torch.nan) for name, x in vars(random).items() if x is not None and "codes" not in name
    }
    packed = cache_format.pack(replace(random, **params))
    offset, gap = 48, 80  # 16-byte aligned and no more
    chunk = packed[0, 0].numel()
    block_stride = num_kv_heads * chunk + gap
    base = torch.randint(-128, 128, (offset + num_blocks * block_stride,), dtype=torch.int8, device=device)
    view = base.as_strided(packed.shape, (block_stride, chunk, packed.shape[3], 1), offset)
    return view.copy_(packed)


def random_kv(seq_len: int, num_kv_heads: int, head_size: int, outliers: bool) -> torch.Tensor:
    """[2, seq_len, num_kv_heads, head_size] of one sequence."""
    kv = torch.randn(2, seq_len, num_kv_heads, head_size)
    if outliers:
        kv[0, ..., 1::29] *= 40.0  # as RoPE models have them: a few channels of K far above the rest
        kv[0, ::13] *= 4.0
        kv[1, 5::11] *= 1e3  # scales of V that differ within a tile
        kv[1, 6::11] *= 1e-3
    return kv


def make_batch(
    lens: Iterable[tuple[int, int]],
    *,
    num_heads: int = 8,
    num_kv_heads: int = 2,
    head_size: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    key_transform: KeyTransform = KeyTransform(),
    outliers: bool = False,
    placement: int = 0,
    cache_format: CacheFormat = K8V8,
) -> Batch:
    """Build a batch of (query_len, seq_len) pairs; `placement` seeds where its blocks lie, and nothing else."""
    lens = list(lens)
    torch.manual_seed(1234)
    query_lens, seq_lens = zip(*lens, strict=True)
    keys, values = zip(*(random_kv(n, num_kv_heads, head_size, outliers) for n in seq_lens), strict=True)
    num_padded = sum(query_lens) + NUM_PADDING_TOKENS
    # As vLLM has it: Q is the first part of a row that also holds K and V.
    qkv = torch.full((num_padded, (num_heads + 2 * num_kv_heads) * head_size), torch.nan, dtype=dtype)
    query = qkv[:, : num_heads * head_size].unflatten(-1, (num_heads, head_size))
    query[: sum(query_lens)] = torch.randn(sum(query_lens), num_heads, head_size).to(dtype)

    seq_blocks = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(seq_blocks) + 5
    torch.manual_seed(placement)
    sizes = (num_blocks, num_kv_heads, block_size, head_size)
    kv_cache = garbage_cache(*sizes, cache_format=cache_format)
    order = torch.randperm(num_blocks).split([*seq_blocks, 5])
    width = max(seq_blocks) + 2
    block_table = torch.full((len(lens), width + 3), NO_BLOCK, dtype=torch.int32)[:, :width]
    slots = []
    for seq, seq_len in enumerate(seq_lens):
        block_table[seq, : seq_blocks[seq]] = order[seq]
        slots.append((order[seq][:, None] * block_size + torch.arange(block_size)).flatten()[:seq_len])
    reference.reshape_and_cache(
        torch.cat(keys),
        torch.cat(values),
        kv_cache,
        torch.cat(slots),
        cache_format=cache_format,
        key_transform=key_transform,
    )
    on_device = garbage_cache(*sizes, device, cache_format).copy_(kv_cache)
    return Batch(
        query=_to_device(query, device),
        kv_cache=on_device,
        block_table=_to_device(block_table, device),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, *query_lens], device=device).cumsum(0).to(torch.int32),
        keys=keys,
        values=values,
        cache_format=cache_format,
    )


def write_args(device: str = "cpu") -> dict[str, Any]:
    """5 tokens, 2 KV heads, head_size 64 into 3 blocks of 16."""
    return {
        "key": torch.randn(5, 2, 64, device=device),
        "value": torch.randn(5, 2, 64, device=device),
        "kv_cache": K8V8.allocate(3, 2, 16, 64, device),
        "slot_mapping": torch.tensor([0, 5, -1, 47, 16], device=device),
    }


def read_args(device: str = "cpu") -> dict[str, Any]:
    """Two sequences of (query_len, seq_len) (1, 20) and (3, 16); 4 heads."""
    written = write_args(device)
    ops.reshape_and_cache(**written, cache_format=K8V8)
    return {
        "query": torch.randn(4, 4, 64, device=device),
        "kv_cache": written["kv_cache"],
        "block_table": torch.tensor([[2, 0], [1, 7]], dtype=torch.int32, device=device),
        "seq_lens": torch.tensor([20, 16], dtype=torch.int32, device=device),
        "query_start_loc": torch.tensor([0, 1, 4], dtype=torch.int32, device=device),
        "softmax_scale": 0.125,
    }


def gather_args(device: str = "cpu") -> dict[str, Any]:
    """4 tokens from the second of a sequence and all 3 of another, as `read_args` has them; a row is left over."""
    read = read_args(device)
    return {
        "key": torch.zeros(8, 2, 64, device=device),
        "value": torch.zeros(8, 2, 64, device=device),
        "kv_cache": read["kv_cache"],
        "block_table": read["block_table"],
        "cu_seq_lens": torch.tensor([0, 4, 7], dtype=torch.int32, device=device),
        "seq_starts": torch.tensor([1, 0], dtype=torch.int32, device=device),
    }


def _to_device(view: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a strided view to a device with its strides and what lies in its gaps."""
    storage = view.as_strided((view.untyped_storage().nbytes() // view.itemsize,), (1,), 0)
    return storage.to(device).as_strided(view.shape, view.stride(), view.storage_offset())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same bytes; unlike torch.equal, NaN equals itself and -0 is not 0."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@lru_cache(maxsize=128)
def reference_attention(batch: Batch, dtype: torch.dtype, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.paged_attention(*batch.args, **options, dtype=dtype, cache_format=batch.cache_format)


def assert_attention_close(got: tuple[torch.Tensor, torch.Tensor], batch: Batch, **options: Any) -> None:
    """Compare (out, lse) of a kernel with float64 attention over the dequantized cache, token by token.

    A token may be off by twice what plain PyTorch in the query's dtype is off by and an ulp of fp32, or by an ulp of
    its largest magnitude in that dtype and four in fp32, whichever is more.
    """
    num_tokens, dtype = batch.num_tokens, batch.query.dtype
    want, want_lse = reference_attention(batch, torch.float64, **options)
    plain, plain_lse = reference_attention(batch, dtype, **options)
    out, lse = got
    assert out.dtype == dtype and lse.dtype == torch.float32

    rows = slice(0, num_tokens)
    error = (out[rows] - want[rows]).abs().flatten(1).amax(1)
    plain_error = (plain[rows] - want[rows]).abs().flatten(1).amax(1)
    fp32_ulp = torch.finfo(torch.float32).eps * want[rows].abs().flatten(1).amax(1)
    floor = torch.finfo(dtype).eps * want[rows].abs().flatten(1).amax(1) + 4 * fp32_ulp
    _assert_below(error, torch.maximum(2 * plain_error + fp32_ulp, floor), "out")

    empty = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    error = (lse - want_lse).abs().masked_fill(empty, 0.0)
    plain_error = (plain_lse - want_lse).abs().masked_fill(empty, 0.0).amax(0)
    # Kernels may hold queries of 16 bits as 16-bit integers, 1.5e-5 of the largest element apart.
    ulps = 4 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2**-14
    floor = ulps * want_lse.abs().masked_fill(empty, 0.0).amax(0).clamp(min=1.0)
    _assert_below(error.amax(0), torch.maximum(2 * plain_error, floor), "lse")


def _assert_below(error: torch.Tensor, bound: torch.Tensor, what: str) -> None:
    bad = ~(error <= bound)  # a NaN is not below anything
    if bad.any():
        token = int(torch.where(bad, (error / bound).nan_to_num(nan=torch.inf), 0.0).argmax())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} tokens are off; token {token} by {error[token]:.3g}, "
            f"allowed {bound[token]:.3g}"
        )

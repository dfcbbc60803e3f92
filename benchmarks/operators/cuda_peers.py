"""What `kernels.py --device cuda` compares with: PyTorch's attention, and that of vLLM, FlashInfer and xFormers where
installed."""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

import torch

from benchmarks.operators.peers import Attend, Batch, Int8Custom, Peer, Shape
from vllm_int8kv.cache.formats import native_content_bytes

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
"""The dtype of all models here."""
NUM_TRITON_SEGMENTS = 16
"""Parts into which vLLM's Triton kernel cuts the keys of a decoding sequence (`NUM_PAR_SOFTMAX_SEGMENTS`)."""
FLASHINFER_WORKSPACE_BYTES = 256 << 20
NUM_FLASH_SPLITS = 32
"""At most so many parts of a sequence in FlashAttention 3 (`flash_attn_max_num_splits_for_cuda_graph`)."""


class Paged16Or8(Peer):
    """A cache `[num_blocks, 2, block_size, num_kv_heads, head_size]` of bf16 or of FP8 codes with scale 1."""

    tolerance = 0.005
    has_write_kernel = False

    def __init__(self, name: str, dtype: torch.dtype, device: str = "cuda") -> None:
        self.name = f"{name} fp8" if dtype == FP8 else f"{name} bf16"
        self.library, self.dtype, self.device = name, dtype, device
        if dtype == FP8:
            self.tolerance = 0.02  # tensor cores in FP8 round queries and probabilities too

    def backend(self, shape: Shape) -> str:
        return self.library

    def slot_bytes(self, head_size: int) -> int:
        return native_content_bytes(head_size, self.dtype.itemsize)

    def allocate(self, shape: Shape) -> torch.Tensor:
        size = (shape.num_blocks, 2, shape.block_size, shape.num_kv_heads, shape.head_size)
        return torch.zeros(size, dtype=BF16, device=self.device).to(self.dtype)

    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key.to(self.dtype).float(), value.to(self.dtype).float()

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        # Bytes, because index_put_ knows no FP8.
        codes = torch.stack([key, value]).to(self.dtype).view(torch.uint8)
        blocks, in_block = slots // shape.block_size, slots % shape.block_size
        for half in (0, 1):
            cache[:, half].view(torch.uint8)[blocks, in_block] = codes[half]


class Sdpa(Paged16Or8):
    """PyTorch's attention on keys and values that lie one after the other: no pages, for comparison only."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__("sdpa, not paged", BF16, device)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        if len(set(shape.seq_lens)) > 1:
            raise ValueError("it takes sequences of one length")
        dense: dict[int, list[torch.Tensor]] = {}

        def gather(cache: torch.Tensor) -> list[torch.Tensor]:
            halves = cache[batch.block_table.long()].movedim(2, 0).flatten(2, 3)[:, :, : shape.seq_len]
            return [half.transpose(1, 2).contiguous() for half in halves]

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            if cache.data_ptr() not in dense:
                dense[cache.data_ptr()] = gather(cache)
            key, value = dense[cache.data_ptr()]
            rows = query.unflatten(0, (shape.num_seqs, shape.query_len)).transpose(1, 2)
            is_prefill = shape.query_len == shape.seq_len
            mask = None
            if shape.query_len > 1 and not is_prefill:
                position = torch.arange(shape.seq_len - shape.query_len, shape.seq_len, device=query.device)
                mask = torch.arange(shape.seq_len, device=query.device) <= position[:, None]
            got = torch.nn.functional.scaled_dot_product_attention(
                rows, key, value, mask, is_causal=is_prefill, scale=shape.softmax_scale, enable_gqa=True
            )
            return out.copy_(got.transpose(1, 2).flatten(0, 1))

        return attend


class FlashAttention(Paged16Or8):
    """FlashAttention 2 or 3 as vLLM ships it, with vLLM's arguments under CUDA graphs, and vLLM's cache write."""

    has_write_kernel = True

    def __init__(self, version: int, dtype: torch.dtype) -> None:
        super().__init__(f"flash_attn_{version}", dtype)
        if dtype == FP8:
            self.tolerance = 0.05  # FlashAttention rounds the probabilities to FP8 too
        self.version, self.scale = version, torch.ones((), device=self.device)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        scale = torch.ones(shape.num_seqs, shape.num_kv_heads, device="cuda")
        options = {"q_descale": scale, "k_descale": scale, "v_descale": scale} if self.dtype == FP8 else {}
        if self.version == 3:
            options |= {"scheduler_metadata": self._schedule(shape, batch), "num_splits": NUM_FLASH_SPLITS}

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            return flash_attn_varlen_func(
                q=query.to(self.dtype),
                k=cache[:, 0],
                v=cache[:, 1],
                out=out,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=shape.query_len,
                seqused_k=batch.seq_lens,
                max_seqlen_k=shape.seq_len,
                softmax_scale=shape.softmax_scale,
                causal=True,
                block_table=batch.block_table,
                fa_version=self.version,
                **options,
            )

        return attend

    def _schedule(self, shape: Shape, batch: Batch) -> torch.Tensor:
        """What vLLM's metadata builder asks for once per step."""
        from vllm.vllm_flash_attn import get_scheduler_metadata

        return get_scheduler_metadata(
            batch_size=shape.num_seqs,
            max_seqlen_q=shape.query_len,
            max_seqlen_k=shape.seq_len,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_size,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=self.dtype,
            cu_seqlens_q=batch.query_start_loc,
            page_size=shape.block_size,
            causal=True,
            num_splits=NUM_FLASH_SPLITS,
        )

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        from vllm import _custom_ops

        dtype, stored_as = ("fp8", torch.uint8) if self.dtype == FP8 else ("auto", BF16)
        halves = (cache[:, half].view(stored_as) for half in (0, 1))
        _custom_ops.reshape_and_cache_flash(key, value, *halves, slots, dtype, self.scale, self.scale)


class FlashInfer(Paged16Or8):
    """FlashInfer's wrappers, planned once per step."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("flashinfer", dtype)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        import flashinfer

        workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        counts = (batch.seq_lens + shape.block_size - 1) // shape.block_size
        indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        used = torch.arange(shape.blocks_per_seq, device="cuda") < counts[:, None]
        pages = (indptr, batch.block_table[used], (batch.seq_lens - 1) % shape.block_size + 1)
        heads = (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size)
        options = {"q_data_type": BF16, "kv_data_type": self.dtype, "sm_scale": shape.softmax_scale}
        if shape.query_len == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            wrapper.plan(*pages, *heads, **options)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            wrapper.plan(batch.query_start_loc, *pages, *heads, causal=True, **options)
        return lambda query, cache, out: wrapper.run(query, cache, out=out)


class XFormers(Paged16Or8):
    """xFormers' split-K kernel on pages, in Triton: bf16, at most 16 query tokens, pages of whole blocks of 64 keys."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__("xformers", BF16, device)

    def allocate(self, shape: Shape) -> torch.Tensor:
        # It wants all pages of K in one piece, then all of V.
        size = (2, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_size)
        return torch.zeros(size, dtype=BF16, device=self.device).transpose(0, 1)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        from xformers.ops import fmha

        mask = fmha.attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            [shape.query_len] * shape.num_seqs,
            shape.seq_lens,
            block_tables=batch.block_table,
            page_size=shape.block_size,
            device=batch.block_table.device,
        )
        grouped = (1, -1, shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_size)

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            key, value = (cache[:, half].flatten(0, 1)[None, :, :, None].expand(grouped) for half in (0, 1))
            got = fmha.memory_efficient_attention_forward(
                query.view(grouped), key, value, mask, scale=shape.softmax_scale, op=fmha.triton_splitk.FwOp
            )
            return out.copy_(got.view(out.shape))

        return attend


class Triton(Paged16Or8):
    """vLLM's Triton kernels with FP8 codes of scale 1."""

    def __init__(self, dtype: torch.dtype = FP8) -> None:
        super().__init__("triton", dtype)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        scale = torch.ones(shape.num_seqs, shape.num_kv_heads, device="cuda")
        return self._plan(shape, batch, lambda cache: (cache[:, 0], cache[:, 1], {}), k_descale=scale, v_descale=scale)

    @staticmethod
    def _plan(shape: Shape, batch: Batch, halves: Callable, **options: object) -> Attend:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        segments = (shape.num_seqs, shape.num_heads, NUM_TRITON_SEGMENTS)
        width = 1 << (shape.head_size - 1).bit_length()
        parts = {
            "softmax_segm_output": torch.empty(*segments, width, device="cuda"),
            "softmax_segm_max": torch.empty(segments, device="cuda"),
            "softmax_segm_expsum": torch.empty(segments, device="cuda"),
            "num_par_softmax_segments": NUM_TRITON_SEGMENTS,
            "seq_threshold_3D": max(1, 128 // shape.num_kv_heads),
        }

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            key, value, scales = halves(cache)
            return unified_attention(
                q=query,
                k=key,
                v=value,
                out=out,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=shape.query_len,
                seqused_k=batch.seq_lens,
                max_seqlen_k=shape.seq_len,
                softmax_scale=shape.softmax_scale,
                causal=True,
                window_size=(-1, -1),
                block_table=batch.block_table,
                softcap=0,
                q_descale=None,
                **options,
                **scales,
                **parts,
            )

        return attend


class TritonInt8PerTokenHead(Triton):
    """vLLM's `int8_per_token_head`: codes, then an fp32 scale per slot and head, in one tensor of bytes."""

    tolerance = 0.005
    has_write_kernel = True

    def __init__(self) -> None:
        super().__init__(torch.int8)
        self.name = "triton int8_per_token_head"

    def slot_bytes(self, head_size: int) -> int:
        return 2 * (head_size + 4)

    def allocate(self, shape: Shape) -> torch.Tensor:
        size = (shape.num_blocks, 2, shape.block_size, shape.num_kv_heads, shape.head_size + 4)
        return torch.zeros(size, dtype=torch.int8, device="cuda")

    @staticmethod
    def _parts(cache: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        codes, scales = cache[..., :-4], cache[..., -4:].view(torch.float32).squeeze(-1)
        return [codes[:, 0], codes[:, 1]], [scales[:, 0], scales[:, 1]]

    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def round_trip(x: torch.Tensor) -> torch.Tensor:
            scale = x.float().abs().amax(-1, keepdim=True) / 127
            return (x.float() / scale).round() * scale

        return round_trip(key), round_trip(value)

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (
            triton_reshape_and_cache_flash_per_token_head_quant,
        )
        from vllm.v1.kv_cache_interface import KVQuantMode

        codes, scales = self._parts(cache)
        triton_reshape_and_cache_flash_per_token_head_quant(
            key, value, *codes, *scales, slots, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD
        )

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        from vllm.v1.kv_cache_interface import KVQuantMode

        def halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            codes, scales = self._parts(cache)
            return *codes, {"k_scale_cache": scales[0], "v_scale_cache": scales[1]}

        mode = {"kv_quant_mode": KVQuantMode.INT8_PER_TOKEN_HEAD}
        return self._plan(shape, batch, halves, k_descale=None, v_descale=None, **mode)


def _flash_attention() -> Iterator[Peer]:
    module = import_module("vllm.vllm_flash_attn.flash_attn_interface")
    if module.is_fa_version_supported(3):
        yield FlashAttention(3, BF16)
        yield FlashAttention(3, FP8)
    elif module.is_fa_version_supported(2):
        yield FlashAttention(2, BF16)


def _triton() -> Iterator[Peer]:
    import_module("triton")
    import_module("vllm.v1.attention.ops.triton_unified_attention")
    yield Triton()
    yield TritonInt8PerTokenHead()


def _flashinfer() -> Iterator[Peer]:
    import_module("flashinfer")
    yield FlashInfer(BF16)
    yield FlashInfer(FP8)


def _xformers() -> Iterator[Peer]:
    import_module("triton")
    import_module("xformers.ops.fmha")
    yield XFormers()


OPTIONAL = {
    "FlashAttention of vLLM": _flash_attention,
    "vLLM's Triton kernels": _triton,
    "FlashInfer": _flashinfer,
    "xFormers": _xformers,
}


@cache
def _installed() -> tuple[list[Peer], dict[str, str]]:
    found, absent = [], {}
    for name, make in OPTIONAL.items():
        try:
            found += make()
        except (ImportError, OSError, RuntimeError) as error:
            absent[name] = str(error).splitlines()[0]
    return found, absent


def load() -> list[Peer]:
    """The implementations on this machine, ours first. One may still refuse a shape or this card."""
    return [Int8Custom(device="cuda"), Sdpa(), *_installed()[0]]


def missing() -> dict[str, str]:
    """What is not installed, and how that shows."""
    return _installed()[1]

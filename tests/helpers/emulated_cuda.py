"""The CUDA kernels on the host: compiles cuda_emulation.cpp and calls it with PyTorch tensors."""

import ctypes
import subprocess
from pathlib import Path
from typing import ClassVar

import torch
from hostile import Batch

from vllm_int8kv.cache import ladder
from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "builds" / "cuda_emulation.cpp"
FLAGS = [
    *["-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"],
]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class KVCache(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
        ("format", ctypes.c_int32),
    ]


class KeyTransformParams(ctypes.Structure):
    _fields_: ClassVar = [("equalizer", ctypes.c_void_p), ("rotate", ctypes.c_bool)]


class ReshapeAndCacheParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cache", KVCache),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        *[(f"{x}_{d}_stride", ctypes.c_int64) for x in ("key", "value") for d in ("token", "head")],
        ("slot_mapping", ctypes.c_void_p),
        ("key_transform", KeyTransformParams),
        ("num_tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


class GatherCacheParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cache", KVCache),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        *[(f"{x}_{d}_stride", ctypes.c_int64) for x in ("key", "value") for d in ("token", "head")],
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("cu_seq_lens", ctypes.c_void_p),
        ("seq_starts", ctypes.c_void_p),
        ("key_transform", KeyTransformParams),
        ("num_rows", ctypes.c_int64),
        ("num_seqs", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class PagedAttentionParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cache", KVCache),
        ("query", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *[(f"{x}_{d}_stride", ctypes.c_int64) for x in ("query", "out") for d in ("token", "head")],
        ("lse", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("seq_lens", ctypes.c_void_p),
        ("query_start_loc", ctypes.c_void_p),
        ("alibi_slopes", ctypes.c_void_p),
        ("sinks", ctypes.c_void_p),
        ("key_transform", KeyTransformParams),
        ("num_tokens", ctypes.c_int64),
        ("num_seqs", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sliding_window", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("causal", ctypes.c_bool),
    ]


class QuantizePerChannelParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("x", ctypes.c_void_p),
        ("x_token_stride", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_channels", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("compute_scales", ctypes.c_bool),
    ]


class DequantizePerChannelParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_channels", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    ]


def build(compiler: str, folder: Path) -> ctypes.CDLL:
    """Compile the kernels into `folder` and load them."""
    (folder / "cuda_runtime_api.h").write_text('#include "cuda_emulation.h"\n')
    library = folder / "emulation.so"
    command = [compiler, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}", f"-I{folder}", SOURCE, "-o", library]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.cache_format.argtypes = [ctypes.c_char_p]
    for name in ("workspace_bytes", "quantize_workspace_bytes", "queue_ticket"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def cache_of(kernels: ctypes.CDLL, kv_cache: torch.Tensor, cache_format: CacheFormat) -> KVCache:
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    sizes = num_blocks, num_kv_heads, block_size, cache_format.head_size_of(kv_cache)
    number = kernels.cache_format(cache_format.name.encode())
    assert number >= 0, f"the kernels have no format {cache_format.name}"
    return KVCache(kv_cache.data_ptr(), *kv_cache.stride()[:2], *sizes, number)


def transform_of(key_transform: KeyTransform) -> KeyTransformParams:
    return KeyTransformParams(pointer(key_transform.equalizer), key_transform.rotate)


def reshape_and_cache(
    kernels: ctypes.CDLL,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
) -> None:
    """`ops.reshape_and_cache` by the CUDA kernel."""
    params = ReshapeAndCacheParams(
        cache_of(kernels, kv_cache, cache_format),
        pointer(key),
        pointer(value),
        *key.stride()[:2],
        *value.stride()[:2],
        pointer(slot_mapping),
        transform_of(key_transform),
        key.shape[0],
        DTYPES[key.dtype],
    )
    assert kernels.reshape_and_cache(ctypes.byref(params)) == 0


def gather_cache(
    kernels: ctypes.CDLL,
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
    """`ops.gather_cache` by the CUDA kernel."""
    params = GatherCacheParams(
        cache_of(kernels, kv_cache, cache_format),
        pointer(key),
        pointer(value),
        *key.stride()[:2],
        *value.stride()[:2],
        pointer(block_table),
        block_table.stride(0),
        pointer(cu_seq_lens),
        pointer(seq_starts),
        transform_of(key_transform),
        key.shape[0],
        len(seq_starts),
        DTYPES[key.dtype],
    )
    assert kernels.gather_cache(ctypes.byref(params)) == 0


def workspace_bytes(kernels: ctypes.CDLL, batch: Batch, *, cache_format: CacheFormat) -> int:
    """What attention of a batch asks for: it grows with the rows per tile of the kernel that is chosen."""
    num_tokens, num_heads, _ = batch.query.shape
    params = PagedAttentionParams(
        cache=cache_of(kernels, batch.kv_cache, cache_format),
        num_tokens=num_tokens,
        num_seqs=len(batch.seq_lens),
        num_heads=num_heads,
        dtype=DTYPES[batch.query.dtype],
    )
    return kernels.workspace_bytes(ctypes.byref(params))


def paged_attention(
    kernels: ctypes.CDLL,
    batch: Batch,
    *,
    softmax_scale: float,
    cache_format: CacheFormat,
    key_transform: KeyTransform = KeyTransform(),
    causal: bool = True,
    sliding_window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `ops.paged_attention` by the CUDA kernels, from a poisoned workspace and output."""
    query = batch.query
    num_tokens, num_heads, _ = query.shape
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    lse = torch.full((num_heads, num_tokens), -torch.inf)
    params = PagedAttentionParams(
        cache_of(kernels, batch.kv_cache, cache_format),
        pointer(query),
        pointer(out),
        *query.stride()[:2],
        *out.stride()[:2],
        pointer(lse),
        pointer(batch.block_table),
        batch.block_table.stride(0),
        pointer(batch.seq_lens),
        pointer(batch.query_start_loc),
        pointer(alibi_slopes),
        pointer(sinks),
        transform_of(key_transform),
        num_tokens,
        len(batch.seq_lens),
        num_heads,
        softmax_scale,
        softcap,
        sliding_window or 0,
        DTYPES[query.dtype],
        causal,
    )
    size = kernels.workspace_bytes(ctypes.byref(params))
    workspace = torch.full((size + 16,), -1, dtype=torch.int8)
    address = -(-workspace.data_ptr() // 16) * 16
    error = kernels.paged_attention(ctypes.byref(params), ctypes.c_void_p(address), ctypes.c_int64(size))
    assert error == 0
    return out, lse


def quantize_per_channel(
    kernels: ctypes.CDLL, x: torch.Tensor, *, variant: str, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ladder.quantize_per_channel` by a CUDA kernel, from a poisoned workspace and poisoned results."""
    codes = torch.full(x.shape, -128, dtype=torch.int8)
    found = torch.full((x.shape[1],), torch.nan) if scales is None else scales
    sizes = (codes.data_ptr(), found.data_ptr(), *x.shape, DTYPES[x.dtype])
    params = QuantizePerChannelParams(x.data_ptr(), x.stride(0), *sizes, scales is None)
    workspace = torch.full((kernels.quantize_workspace_bytes(ctypes.byref(params)),), -1, dtype=torch.int8)
    place = ctypes.c_void_p(workspace.data_ptr()), ctypes.c_int64(len(workspace))
    assert kernels.quantize_per_channel(ctypes.byref(params), ladder.CUDA_VARIANTS.index(variant), *place) == 0
    return codes, found


def dequantize_per_channel(
    kernels: ctypes.CDLL, codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype, variant: str
) -> torch.Tensor:
    """`ladder.dequantize_per_channel` by a CUDA kernel."""
    x = torch.full(codes.shape, torch.nan, dtype=dtype)
    params = DequantizePerChannelParams(codes.data_ptr(), scales.data_ptr(), x.data_ptr(), *codes.shape, DTYPES[dtype])
    assert kernels.dequantize_per_channel(ctypes.byref(params), ladder.CUDA_VARIANTS.index(variant)) == 0
    return x


def queue_tickets(kernels: ctypes.CDLL, *sizes: int) -> list[tuple[int, int, bool]]:
    """(strip, first token, is amax) of every ticket, for sizes as `make_quantize_queue` takes them."""
    item = (ctypes.c_int64 * 3)()

    def ticket(number: int) -> int:
        tokens, channels, element_bytes, *rest = sizes
        wide = [ctypes.c_int64(size) for size in (*rest, number)]
        return kernels.queue_ticket(ctypes.c_int64(tokens), ctypes.c_int64(channels), element_bytes, *wide, item)

    return [(item[0], item[1], bool(item[2])) for number in range(ticket(0)) if ticket(number)]

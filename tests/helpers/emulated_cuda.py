"""The CUDA kernels on the host: compiles cuda_emulation.cpp and calls it with PyTorch tensors."""

import ctypes
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import hostile
import pytest
import torch
from hostile import Batch

from vllm_int8kv.cache import ladder
from vllm_int8kv.cache.formats import FORMATS as all_formats
from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "tests" / "builds" / "cuda_emulation.cpp"
DRIVER_SOURCE = ROOT / "tests" / "builds" / "cuda_driver.cpp"
DRIVER_FORMATS = ("k8v8", "k6v4")
FORMAT_SOURCE = ROOT / "csrc" / "cuda" / "attention" / "format_kernels.cu"
FORMATS = ("k8v8", "k6v4", "k8v5", "k5v8", "k4v6", "k2v2")
"""Those whose attention kernels are compiled by default, two to three seconds each: every number of bits of K and of V,
and the smallest spans. The kernels of the cache write and the gather are there for all formats."""
FLAGS = [
    *["-std=c++20", "-O2", "-march=native", "-fPIC", "-ffp-contract=off"],
    *["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-clobbered"],
]
MODES = [(0, 0, 0), (1, 1, 1)]
"""copies land late, threads run in falling order, blocks in random order"""
BLOCKS = [3, 1, 7]
"""thread blocks that the device holds, which share the work"""
OPTIONS = {
    "sliding-window": {"sliding_window": 90},
    "non-causal": {"causal": False},
    "non-causal-window": {"causal": False, "sliding_window": 33},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, 6)},
    "sinks": {"sinks": torch.linspace(-3.0, 6.0, 6)},
    "no-rotation": {"key_transform": KeyTransform(rotate=False)},
    "equalizer": {"key_transform": KeyTransform(equalizer=torch.linspace(0.2, 9.0, 128).view(2, 64))},
    "one-block": {"num_blocks": 1},
    "many-blocks": {"num_blocks": 13},
}
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


def formats_of(config: pytest.Config) -> Iterable[str]:
    """The cache formats whose attention kernels a run compiles."""
    return all_formats if config.getoption("--all-formats") else FORMATS


def build(compiler: str, folder: Path, formats: Iterable[str] = FORMATS) -> ctypes.CDLL:
    """Compile the kernels into `folder`, attention for `formats` only, and load them."""
    (folder / "cuda_runtime_api.h").write_text('#include "cuda_emulation.h"\n')
    without = folder / "without.cpp"
    without.write_text(
        '#include "cuda_emulation.h"\n#include "cuda/attention/kernel_choice.h"\nnamespace int8kv {\n'
        + "".join(
            f"template <> cudaError_t choose_kernel<FormatOf<{x.k_bits}, {x.v_bits}>>(const PagedAttentionParams&, "
            "KernelChoice*) { return cudaErrorInvalidValue; }\n"
            for name, x in all_formats.items()
            if name not in formats
        )
        + "}\n"
    )
    jobs = {"main": [SOURCE], "without": [without]}
    for name in formats:
        x = all_formats[name]
        bits = [f"-DINT8KV_K_BITS={x.k_bits}", f"-DINT8KV_V_BITS={x.v_bits}"]
        jobs[name] = [*bits, "-include", "cuda_emulation.h", "-x", "c++", FORMAT_SOURCE]

    def compile_one(name: str) -> Path:
        object_file = folder / f"{name}.o"
        paths = [f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}", f"-I{folder}"]
        subprocess.run([compiler, *FLAGS, *paths, "-c", *jobs[name], "-o", object_file], check=True)
        return object_file

    library = folder / "emulation.so"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, jobs))
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("check_slots", "check_attention", "check_gather"):
        getattr(loaded, name).restype = ctypes.c_char_p
    loaded.cache_format.argtypes = [ctypes.c_char_p]
    loaded.set_mode.argtypes = [ctypes.c_int] * 4  # too few arguments are an error then, not anything
    loaded.set_shared_bytes.argtypes = [ctypes.c_int]
    loaded.set_l2_bytes.argtypes = [ctypes.c_int64]
    for name in (
        "workspace_bytes",
        "prepare_paged_attention",
        "wrong_quotients",
        "quantize_workspace_bytes",
        "queue_ticket",
    ):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def build_driver(compiler: str, kernels: ctypes.CDLL, folder: Path, *options: str) -> Path:
    """Compile `cuda_driver` in `folder`, to run on kernels that `build` has made of its formats."""
    (folder / "cuda_runtime_api.h").write_text('#include "emulated_runtime.h"\n')
    driver, library = folder / DRIVER_SOURCE.stem, Path(kernels._name)
    paths = [f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{SOURCE.parent}"]
    link = [str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([compiler, *FLAGS, *paths, *options, DRIVER_SOURCE, *link, "-o", driver], check=True)
    return driver


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def cache_of(kernels: ctypes.CDLL, kv_cache: torch.Tensor, cache_format: CacheFormat, head_size: int) -> KVCache:
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    sizes = num_blocks, num_kv_heads, block_size, head_size
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
    only_check: bool = False,
) -> str | None:
    """`ops.reshape_and_cache` by the CUDA kernel; or what the checks of bounds find."""
    params = ReshapeAndCacheParams(
        cache_of(kernels, kv_cache, cache_format, key.shape[-1]),
        pointer(key),
        pointer(value),
        *key.stride()[:2],
        *value.stride()[:2],
        pointer(slot_mapping),
        transform_of(key_transform),
        key.shape[0],
        DTYPES[key.dtype],
    )
    if only_check:
        return kernels.check_slots(ctypes.byref(params)).decode()
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
    only_check: bool = False,
) -> str | None:
    """`ops.gather_cache` by the CUDA kernel; or what the checks of bounds find."""
    params = GatherCacheParams(
        cache_of(kernels, kv_cache, cache_format, key.shape[-1]),
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
    if only_check:
        return kernels.check_gather(ctypes.byref(params), ctypes.c_int64(block_table.shape[1])).decode()
    assert kernels.gather_cache(ctypes.byref(params)) == 0


def sizes_of(kernels: ctypes.CDLL, batch: Batch, cache_format: CacheFormat) -> PagedAttentionParams:
    num_tokens, num_heads, head_size = batch.query.shape
    return PagedAttentionParams(
        cache=cache_of(kernels, batch.kv_cache, cache_format, head_size),
        num_tokens=num_tokens,
        num_seqs=len(batch.seq_lens),
        num_heads=num_heads,
        dtype=DTYPES[batch.query.dtype],
    )


def workspace_bytes(kernels: ctypes.CDLL, batch: Batch, *, cache_format: CacheFormat) -> int:
    """What attention of a batch asks for: it grows with the rows per tile of the kernel that is chosen."""
    return kernels.workspace_bytes(ctypes.byref(sizes_of(kernels, batch, cache_format)))


def arrivals_for(kernels: ctypes.CDLL, batch: Batch, cache_format: CacheFormat) -> torch.Tensor:
    """What `ops.prepare_paged_attention` returns, by the CUDA code."""
    count = kernels.prepare_paged_attention(ctypes.byref(sizes_of(kernels, batch, cache_format)))
    assert count > 0
    return torch.zeros(count, dtype=torch.int32)


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
    arrivals: torch.Tensor | None = None,
    only_check: bool = False,
) -> Any:
    """(out, lse) of `ops.paged_attention` by the CUDA kernels, from a poisoned workspace and output; or what the checks
    of bounds find."""
    query = batch.query
    num_tokens, num_heads, _ = query.shape
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    lse = torch.full((num_heads, num_tokens), -torch.inf)
    params = PagedAttentionParams(
        cache_of(kernels, batch.kv_cache, cache_format, batch.query.shape[-1]),
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
    if only_check:
        max_blocks = ctypes.c_int64(batch.block_table.shape[1])
        return kernels.check_attention(ctypes.byref(params), max_blocks).decode()
    size = kernels.workspace_bytes(ctypes.byref(params))
    workspace = torch.full((size + 16,), -1, dtype=torch.int8)
    address = -(-workspace.data_ptr() // 16) * 16
    counters = ctypes.c_void_p(pointer(arrivals)), ctypes.c_int64(0 if arrivals is None else len(arrivals))
    place = ctypes.c_void_p(address), ctypes.c_int64(size), *counters
    assert kernels.paged_attention(ctypes.byref(params), *place) == 0
    return out, lse


def results(
    kernels: ctypes.CDLL, batch: hostile.Batch, num_blocks: int, **options: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for mode in MODES:
        kernels.set_mode(*mode, num_blocks)
        # Without arrivals of the caller, and twice with the same, which every launch leaves as it found them.
        arrivals = arrivals_for(kernels, batch, batch.cache_format) if any(mode) else None
        for _ in range(2 if any(mode) else 1):
            yield paged_attention(kernels, batch, **options, cache_format=batch.cache_format, arrivals=arrivals)
        assert arrivals is None or not arrivals.any()


def check(
    kernels: ctypes.CDLL, batch: hostile.Batch, num_blocks: int = BLOCKS[0], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of a batch, compared with the reference, in two modes that differ in the order of threads and blocks
    and in when asynchronous copies land, and must give equal bits."""
    window = options.get("sliding_window")
    seen = batch.freed_before_window(window) if window else batch
    first, *others = results(kernels, seen, num_blocks, **options)
    hostile.assert_attention_close(first, batch, **options)
    for other in others:
        for name, x, y in zip(("out", "lse"), first, other, strict=True):
            assert hostile.same_bits(x, y), f"{name} depends on the order of blocks, threads or copies"
    return first


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

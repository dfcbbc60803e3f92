"""The CUDA kernels, run on the host thread by thread (cuda_emulation.h): what they compute, without a GPU.

The same hostile inputs and tolerances as for every other kernel; small shapes, since a warp here is 32 fibers.
Each case runs in two modes that differ in the order of threads and in when asynchronous copies land, and both
must give equal bits.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import hostile
import pytest
import torch

from vllm_int8kv import cache_layout, reference

HERE = Path(__file__).parent
FLAGS = "-std=c++20 -O2 -march=native -fPIC -shared -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-clobbered -ffp-contract=off"
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MODES = [(0, 0, 3), (1, 1, 2)]
"""copies land late, threads run in falling order, resident blocks"""


class KVCache(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("head_size", ctypes.c_int32),
    ]


class ReshapeAndCacheParams(ctypes.Structure):
    _fields_: ClassVar = [
        ("cache", KVCache),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        *[(f"{x}_{d}_stride", ctypes.c_int64) for x in ("key", "value") for d in ("token", "head")],
        ("slot_mapping", ctypes.c_void_p),
        ("key_equalizer", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("rotate_keys", ctypes.c_bool),
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
        ("key_equalizer", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_seqs", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("sliding_window", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("causal", ctypes.c_bool),
        ("rotate_keys", ctypes.c_bool),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++ for its 16-bit floats")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    (folder / "cuda_runtime_api.h").write_text('#include "cuda_emulation.h"\n')
    library = folder / "emulation.so"
    command = [compiler, *FLAGS.split(), f"-I{HERE}", f"-I{folder}", HERE / "cuda_emulation.cpp", "-o", library]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.workspace_bytes.restype = ctypes.c_int64
    return loaded


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def cache_of(kv_cache: torch.Tensor) -> KVCache:
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    head_size = cache_layout.head_size_of(kv_cache)
    return KVCache(kv_cache.data_ptr(), *kv_cache.stride()[:2], num_blocks, num_kv_heads, block_size, head_size)


def write(kernels, key, value, kv_cache, slot_mapping, *, rotate_keys=True, key_equalizer=None) -> None:
    params = ReshapeAndCacheParams(
        cache_of(kv_cache),
        pointer(key),
        pointer(value),
        *key.stride()[:2],
        *value.stride()[:2],
        pointer(slot_mapping),
        pointer(key_equalizer),
        key.shape[0],
        DTYPES[key.dtype],
        rotate_keys,
    )
    assert kernels.reshape_and_cache(ctypes.byref(params)) == 0


def attend(
    kernels,
    batch: hostile.Batch,
    *,
    softmax_scale: float,
    causal=True,
    sliding_window=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    rotate_keys=True,
    key_equalizer=None,
    max_partials=32,
) -> tuple[torch.Tensor, torch.Tensor]:
    query = batch.query
    num_tokens, num_heads, _ = query.shape
    out = torch.full(query.shape, torch.nan, dtype=query.dtype)
    lse = torch.full((num_heads, num_tokens), -torch.inf)
    params = PagedAttentionParams(
        cache_of(batch.kv_cache),
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
        pointer(key_equalizer),
        num_tokens,
        len(batch.seq_lens),
        num_heads,
        softmax_scale,
        softcap,
        sliding_window or 0,
        DTYPES[query.dtype],
        causal,
        rotate_keys,
    )
    size = kernels.workspace_bytes(ctypes.byref(params), max_partials)
    workspace = torch.full((size + 16,), -1, dtype=torch.int8)
    address = -(-workspace.data_ptr() // 16) * 16
    error = kernels.paged_attention(ctypes.byref(params), max_partials, ctypes.c_void_p(address), ctypes.c_int64(size))
    assert error == 0
    return out, lse


def results(kernels: ctypes.CDLL, batch: hostile.Batch, **options) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for mode in MODES:
        kernels.set_mode(*mode)
        yield attend(kernels, batch, **options)


def check(kernels: ctypes.CDLL, batch: hostile.Batch, **options) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = results(kernels, batch, **options)
    options.pop("max_partials", None)
    hostile.assert_attention_close(first, batch, **options)
    assert hostile.same_bits(first[0], second[0]), "out depends on the order of threads or copies"
    assert hostile.same_bits(first[1], second[1]), "lse depends on the order of threads or copies"
    return first


@pytest.mark.parametrize("mode", MODES, ids=["eager-rising", "late-falling"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("head_size", [32, 80, 128, 192, 256, 512])
def test_cache_write_is_bit_equal(kernels, head_size, dtype, mode):
    kernels.set_mode(*mode)
    num_kv_heads, block_size = 2, 48
    # A full group off the token grid, a group cut short by padding, single tokens, a group across -1.
    slot_mapping = torch.tensor(
        [200, -1, 5, *range(32, 59), -1, 144, 145, 147, *range(96, 112), 112, 7, *range(160, 175), -1, 250]
    )
    qkv = torch.randn(len(slot_mapping), 3, num_kv_heads, head_size).to(dtype)
    qkv[3, 1, 0, 5], qkv[4, 2, 1] = torch.nan, 0.0
    qkv[6, 1, 1, 2:4] = torch.inf
    key, value = qkv[:, 1], qkv[:, 2]
    equalizer = torch.rand(num_kv_heads, head_size) + 0.5
    for rotate_keys, key_equalizer in [(False, None), (True, equalizer)]:
        got = hostile.garbage_cache(6, num_kv_heads, block_size, head_size)
        want = got.clone()
        options = {"rotate_keys": rotate_keys, "key_equalizer": key_equalizer}
        write(kernels, key, value, got, slot_mapping, **options)
        reference.reshape_and_cache(key, value, want, slot_mapping, **options)
        assert hostile.same_bits(got, want)


LENS = [(1, 1), (1, 63), (1, 64), (1, 65), (1, 700), (5, 18), (3, 300), (1, 257), (40, 90), (17, 17)]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "head_size, num_heads, num_kv_heads, block_size",
    [(64, 8, 2, 16), (128, 4, 4, 32), (80, 7, 1, 16), (32, 3, 1, 48), (256, 4, 2, 16), (176, 10, 1, 64)],
)
def test_mixed_batches(kernels, head_size, num_heads, num_kv_heads, block_size, dtype):
    batch = hostile.make_batch(
        LENS,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        dtype=dtype,
        outliers=head_size == 128,
    )
    check(kernels, batch, softmax_scale=head_size**-0.5)


OPTIONS = {
    "sliding-window": {"sliding_window": 90},
    "non-causal": {"causal": False},
    "non-causal-window": {"causal": False, "sliding_window": 33},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, 6)},
    "sinks": {"sinks": torch.linspace(-3.0, 6.0, 6)},
    "no-rotation": {"rotate_keys": False},
    "equalizer": {"key_equalizer": torch.linspace(0.2, 9.0, 128).view(2, 64)},
    "one-partial": {"max_partials": 1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(kernels, name, dtype):
    options = OPTIONS[name]
    batch = hostile.make_batch(
        [(1, 400), (4, 530), (20, 100)],
        num_heads=6,
        dtype=dtype,
        rotate_keys=options.get("rotate_keys", True),
        key_equalizer=options.get("key_equalizer"),
    )
    if "sliding_window" in options:
        batch = batch.freed_before_window(options["sliding_window"])
    check(kernels, batch, softmax_scale=0.125, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_bits_do_not_depend_on_the_batch(kernels, dtype):
    batch = hostile.make_batch([(1, 900), (3, 300), (30, 30)], num_heads=6, dtype=dtype)
    kernels.set_mode(*MODES[0])
    out, lse = attend(kernels, batch, softmax_scale=0.125)
    for seq in range(3):
        alone, alone_lse = attend(kernels, batch.alone(seq), softmax_scale=0.125)
        assert hostile.same_bits(out[batch.rows(seq)], alone)
        assert hostile.same_bits(lse[:, batch.rows(seq)], alone_lse)


def test_more_sequences_than_threads(kernels):
    batch = hostile.make_batch([(1, 1 + i % 5) for i in range(150)], num_heads=2, num_kv_heads=1, dtype=torch.float16)
    check(kernels, batch, softmax_scale=0.125)


def test_v_scales_of_every_magnitude(kernels):
    batch = hostile.make_batch([(1, 200)], dtype=torch.float16)
    batch.values[0].mul_(10.0 ** torch.linspace(-6, 3, 200)[:, None, None])
    slots = batch.block_table[0, :13].long()[:, None] * 16 + torch.arange(16)
    reference.reshape_and_cache(batch.keys[0], batch.values[0], batch.kv_cache, slots.flatten()[:200])
    check(kernels, batch, softmax_scale=0.125)


def test_shared_memory_fits_every_gpu(kernels):
    """A launch that asks for more than Turing's 64 KiB returns an error, so this shape runs nowhere smaller."""
    batch = hostile.make_batch([(2, 70)], num_heads=16, num_kv_heads=1, head_size=256, dtype=torch.float16)
    check(kernels, batch, softmax_scale=0.0625)

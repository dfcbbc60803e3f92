"""vLLM's own CPU attention, for `kernels.py`."""

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.operators.peers import Attend, Batch, Int8Custom, Peer, Shape
from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import FORMATS, native_content_bytes


class VllmCpu(Peer):
    """vLLM's `CPU_ATTN`, as `vllm/v1/attention/backends/cpu_attn.py` calls it."""

    def __init__(self, kv_cache_dtype: str, dtype: torch.dtype, tolerance: float) -> None:
        self.name = kv_cache_dtype
        self.dtype = dtype
        self.tolerance = tolerance

    def backend(self, shape: Shape) -> str:
        return f"CPU_ATTN {self._isa(shape)}"

    def slot_bytes(self, head_size: int) -> int:
        return native_content_bytes(head_size, self.dtype.itemsize)

    def allocate(self, shape: Shape) -> torch.Tensor:
        size = (shape.num_blocks, shape.num_kv_heads, shape.block_size, 2 * shape.head_size)
        # vLLM keeps fp8 codes as bytes.
        return torch.zeros(size, dtype=torch.uint8 if self.dtype.itemsize == 1 else self.dtype)

    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.dtype == torch.float8_e4m3fn:
            return truncate_to_e4m3(key), truncate_to_e4m3(value)
        return key.to(self.dtype).float(), value.to(self.dtype).float()

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        key_cache, value_cache = _halves(cache)
        vllm_ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache,
            value_cache,
            slots,
            self._isa(shape),
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=self.name,
        )

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.num_seqs,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            seq_lens=batch.seq_lens,
            dtype=shape.torch_dtype,
            query_start_loc=batch.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa(shape),
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.name,
        )

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            key_cache, value_cache = _halves(cache)
            return vllm_ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=key_cache,
                value_cache=value_cache,
                output=out,
                query_start_loc=batch.query_start_loc,
                seq_lens=batch.seq_lens,
                scale=shape.softmax_scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=batch.block_table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
                kv_cache_dtype=self.name,
            )

        return attend

    def _isa(self, shape: Shape) -> str:
        return _get_attn_isa(shape.torch_dtype, shape.block_size, shape.head_size, self.name)


def truncate_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """`x` through vLLM's fp8 cache on CPU: it rounds toward zero (1.1 becomes 1.0, not 1.125) and saturates at 448."""
    x = x.float().clamp(-448, 448)
    nearest = x.to(torch.float8_e4m3fn)
    away = nearest.float().abs() > x.abs()
    return (nearest.view(torch.uint8) - away.to(torch.uint8)).view(torch.float8_e4m3fn).float()


def _halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a vLLM cache, as its backend takes it apart in every call."""
    num_blocks, num_kv_heads, block_size, _ = cache.size()
    key_cache, value_cache = cache.view(num_blocks, num_kv_heads, block_size * 2, -1).chunk(2, dim=2)
    return key_cache, value_cache


def missing() -> dict[str, str]:
    """What vLLM does not run on this CPU, by kv_cache_dtype, with its reason."""
    try:
        _get_attn_isa(torch.bfloat16, block_size=128, head_size=128, kv_cache_dtype="fp8")
    except NotImplementedError as error:
        return {"fp8": str(error)}
    return {}


MEASURED_FORMATS = ("k8v4", "k6v6", "k6v4", "k4v4", "k2v2")
"""Beside k8v8."""


def load(dtype: torch.dtype, every_isa: bool = False, every_format: bool = False) -> list[Peer]:
    """The implementations this CPU can run, ours first.

    Args:
        dtype: of the model.
        every_isa: ours also with the instruction sets of older CPUs.
        every_format: ours also with the cache formats `MEASURED_FORMATS`.

    Raises:
        RuntimeError: vLLM here is not its CPU build.
    """
    if not current_platform.is_cpu():
        raise RuntimeError(f"these benchmarks need vLLM's CPU build, got platform {current_platform.device_name!r}")
    current_platform.import_kernels()
    others = [Int8Custom(isa) for isa in library.cpu_isas()[:-1]] if every_isa else []
    others += [Int8Custom(cache_format=FORMATS[name]) for name in MEASURED_FORMATS] if every_format else []
    not_here = missing()
    caches = [VllmCpu("auto", dtype, tolerance=0.005), VllmCpu("fp8", torch.float8_e4m3fn, tolerance=0.005)]
    return [Int8Custom(), *others, *(peer for peer in caches if peer.name not in not_here)]

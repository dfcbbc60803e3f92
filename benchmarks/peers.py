"""The implementations that `kernels.py` compares, behind one interface: ours and vLLM's own CPU attention.

Each is called the way its vLLM backend calls it. What vLLM computes once per step for all layers (the scheduler
metadata of `CPU_ATTN`) is made in `plan`, outside of the timed region.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_int8kv import cache_layout, ops, reference

QUERY_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A batch of equal sequences. `seq_len` counts the tokens in the cache, the last `query_len` included."""

    num_seqs: int
    seq_len: int
    query_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int = 128

    @property
    def blocks_per_seq(self) -> int:
        return -(-self.seq_len // self.block_size)

    @property
    def num_blocks(self) -> int:
        return self.num_seqs * self.blocks_per_seq

    @property
    def num_tokens(self) -> int:
        return self.num_seqs * self.query_len

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5


@dataclass(frozen=True)
class Batch:
    """What vLLM hands to every layer of a step."""

    block_table: torch.Tensor
    """[num_seqs, blocks_per_seq] int32"""
    seq_lens: torch.Tensor
    """[num_seqs] int32"""
    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32"""


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""(query, cache, out) -> ...; writes `out`."""


class Peer(ABC):
    """One KV cache format with its two operators."""

    name: str
    """the kv_cache_dtype"""
    tolerance: float
    """Largest |out - reference| / |reference| (L2), against exact attention over `stored` keys and values. Rounding
    a correct answer to bf16 makes 0.0017."""

    @abstractmethod
    def backend(self, shape: Shape) -> str:
        """The code that runs for a shape, with its instruction set."""

    @abstractmethod
    def slot_bytes(self, head_size: int) -> int:
        """Bytes of one slot of one KV head."""

    @abstractmethod
    def allocate(self, shape: Shape) -> torch.Tensor:
        """An empty cache of one layer, blocks first."""

    @abstractmethod
    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as the format keeps them, fp32."""

    @abstractmethod
    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        """Write keys and values `[num_tokens, num_kv_heads, head_size]` to slots `[num_tokens]` int64."""

    @abstractmethod
    def plan(self, shape: Shape, batch: Batch) -> Attend:
        """What one layer calls in a step with this batch, for the current number of threads."""


class Int8Custom(Peer):
    """This project's operators, with the fastest instruction set that the CPU has or with one by name."""

    tolerance = 0.005

    def __init__(self, isa: str | None = None) -> None:
        self.name = f"int8_custom {isa}" if isa else "int8_custom"
        self.isa = isa or ops.cpu_isas()[-1]

    def backend(self, shape: Shape) -> str:
        return f"INT8_KV {self.isa}"

    def slot_bytes(self, head_size: int) -> int:
        return cache_layout.content_bytes(head_size)

    def allocate(self, shape: Shape) -> torch.Tensor:
        return cache_layout.allocate(shape.num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size)

    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def round_trip(x: torch.Tensor) -> torch.Tensor:
            codes, scales = reference.quantize(x)
            return codes.float() * scales.float()[..., None]

        factors = self._key_equalizer(*key.shape[1:])
        # The rotation is its own inverse, so this is where the rotated, quantized keys lie in the original space.
        rotated = reference.hadamard_rotate(round_trip(reference.hadamard_rotate(key.float() / factors)))
        return rotated * factors, round_trip(value)

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        key_equalizer = self._key_equalizer(shape.num_kv_heads, shape.head_size)
        ops.set_cpu_isa(self.isa)
        ops.reshape_and_cache(key, value, cache, slots, key_equalizer=key_equalizer)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        key_equalizer = self._key_equalizer(shape.num_kv_heads, shape.head_size)

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            ops.set_cpu_isa(self.isa)  # 0.5 us
            return ops.paged_attention(
                query,
                cache,
                batch.block_table,
                batch.seq_lens,
                batch.query_start_loc,
                softmax_scale=shape.softmax_scale,
                key_equalizer=key_equalizer,
                out=out,
            )

        return attend

    @staticmethod
    @cache
    def _key_equalizer(num_kv_heads: int, head_size: int) -> torch.Tensor:
        """Powers of two as the plugin takes them from a model; with these keys and queries any will do."""
        generator = torch.Generator().manual_seed(0)
        return torch.exp2(torch.randint(-1, 2, (num_kv_heads, head_size), generator=generator).float())


class VllmCpu(Peer):
    """vLLM's `CPU_ATTN`, as `vllm/v1/attention/backends/cpu_attn.py` calls it."""

    def __init__(self, kv_cache_dtype: str, dtype: torch.dtype, tolerance: float) -> None:
        self.name = kv_cache_dtype
        self.dtype = dtype
        self.tolerance = tolerance

    def backend(self, shape: Shape) -> str:
        return f"CPU_ATTN {self._isa(shape)}"

    def slot_bytes(self, head_size: int) -> int:
        return 2 * head_size * self.dtype.itemsize

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
            dtype=QUERY_DTYPE,
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
        return _get_attn_isa(QUERY_DTYPE, shape.block_size, shape.head_size, self.name)


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


def load(every_isa: bool = False) -> list[Peer]:
    """The implementations, ours first, and with the instruction sets of older CPUs if asked to.

    Raises:
        RuntimeError: vLLM here is not its CPU build.
    """
    if not current_platform.is_cpu():
        raise RuntimeError(f"these benchmarks need vLLM's CPU build, got platform {current_platform.device_name!r}")
    current_platform.import_kernels()
    slower = [Int8Custom(isa) for isa in ops.cpu_isas()[:-1]] if every_isa else []
    return [
        Int8Custom(),
        *slower,
        VllmCpu("auto", torch.bfloat16, tolerance=0.005),
        VllmCpu("fp8", torch.float8_e4m3fn, tolerance=0.005),
    ]

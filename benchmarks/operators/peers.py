"""What `kernels.py` compares, behind one interface, and this project's operators in it.

Each implementation is called the way its vLLM backend calls it. What vLLM computes once per step for all layers (the
scheduler metadata of `CPU_ATTN`) is made in `plan`, outside of the timed region. The others are in `cpu_peers.py` and
`cuda_peers.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from vllm_int8kv.cache import library, ops
from vllm_int8kv.cache.formats import K8V8, CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.serving import prefill, varlen_attention
from vllm_int8kv.serving.varlen_attention import VarlenAttention


def name_missing(missing: dict[str, str]) -> None:
    """Say what cannot be compared with here, and why."""
    for name, why in missing.items():
        print(f"not here: {name} ({why})")


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
    dtype: str = "bfloat16"
    """Of the model: queries, new keys and values, and vLLM's cache `auto`."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

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
    def seq_lens(self) -> list[int]:
        return [self.seq_len] * self.num_seqs

    @property
    def softmax_scale(self) -> float:
        return self.head_size**-0.5


@dataclass(frozen=True)
class RaggedShape(Shape):
    """A batch of sequences from `shortest` to `seq_len` tokens, each a constant factor longer than the one before."""

    shortest: int = 16

    @property
    def seq_lens(self) -> list[int]:
        growth = (self.seq_len / self.shortest) ** (1 / max(1, self.num_seqs - 1))
        lens = [round(self.seq_len / growth**seq) for seq in range(self.num_seqs)]
        return lens[::2] + lens[1::2][::-1]  # long and short ones among each other


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
    has_write_kernel = True
    """Whether `write` is one kernel, worth timing, or only a way to fill the cache."""

    @abstractmethod
    def backend(self, shape: Shape) -> str:
        """The code that runs for a shape, with its instruction set."""

    @abstractmethod
    def slot_bytes(self, head_size: int) -> int:
        """Bytes of one slot of one KV head."""

    @abstractmethod
    def allocate(self, shape: Shape) -> torch.Tensor:
        """An empty cache of one layer, blocks first, on the device of the implementation."""

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
    """This project's operators on a device; on CPU with the fastest instruction set, or with one by name."""

    tolerance = 0.005

    def __init__(self, isa: str | None = None, device: str = "cpu", cache_format: CacheFormat = K8V8) -> None:
        self.name = " ".join(["int8_custom", *([isa] if isa else []), *([cache_format.name] * (cache_format != K8V8))])
        self.cache_format = cache_format
        self.isa = isa or (library.cpu_isas()[-1] if device == "cpu" else None)
        self.device = device

    def backend(self, shape: Shape) -> str:
        attention = "" if self._prefill_attention(shape) is None else ", FlashAttention"
        return f"INT8_KV {self.isa or self.device}{attention}"

    def slot_bytes(self, head_size: int) -> int:
        return self.cache_format.content_bytes(head_size)

    def allocate(self, shape: Shape) -> torch.Tensor:
        sizes = shape.num_blocks, shape.num_kv_heads, shape.block_size, shape.head_size
        return self.cache_format.allocate(*sizes, self.device)

    def stored(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        transform = self._key_transform(*key.shape[1:], key.device)
        return transform.undo_keys(self.cache_format.round_trip_k(transform.keys(key))), self.cache_format.round_trip_v(
            value
        )

    def write(self, shape: Shape, key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
        key_transform = self._key_transform(shape.num_kv_heads, shape.head_size, key.device)
        self._choose_isa()
        ops.reshape_and_cache(key, value, cache, slots, cache_format=self.cache_format, key_transform=key_transform)

    def plan(self, shape: Shape, batch: Batch) -> Attend:
        key_transform = self._key_transform(shape.num_kv_heads, shape.head_size, batch.seq_lens.device)
        attention = self._prefill_attention(shape)
        if attention is not None:
            return self._plan_prefill(shape, batch, attention)

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            self._choose_isa()
            return ops.paged_attention(
                query,
                cache,
                batch.block_table,
                batch.seq_lens,
                batch.query_start_loc,
                softmax_scale=shape.softmax_scale,
                cache_format=self.cache_format,
                key_transform=key_transform,
                out=out,
            )

        return attend

    def _prefill_attention(self, shape: Shape) -> VarlenAttention | None:
        """What the plugin gives prompts of this length to, instead of its own kernel."""
        if shape.query_len <= prefill.MAX_DECODE_QUERY_LEN:
            return None
        return varlen_attention.find(self.device, shape.torch_dtype, shape.head_size)

    def _plan_prefill(self, shape: Shape, batch: Batch, attention: VarlenAttention) -> Attend:
        key_transform = self._key_transform(shape.num_kv_heads, shape.head_size, batch.seq_lens.device)
        plan = prefill.make_plan(
            batch.query_start_loc.tolist(),
            batch.seq_lens.tolist(),
            num_decodes=0,
            sliding_window=None,
            max_rows=shape.query_len + prefill.MAX_CONTEXT_ROWS,
            device=batch.seq_lens.device,
        )
        size = (2, plan.num_rows, shape.num_kv_heads, shape.head_size)
        key, value = torch.empty(size, dtype=shape.torch_dtype, device=self.device)

        def attend(query: torch.Tensor, cache: torch.Tensor, out: torch.Tensor) -> object:
            return prefill.attend(
                query,
                cache,
                batch.block_table,
                plan,
                (key, value),
                attention,
                softmax_scale=shape.softmax_scale,
                cache_format=self.cache_format,
                key_transform=key_transform,
                out=out,
            )

        return attend

    def _choose_isa(self) -> None:
        if self.isa is not None:
            library.set_cpu_isa(self.isa)  # 0.5 us

    @staticmethod
    @cache
    def _key_transform(num_kv_heads: int, head_size: int, device: torch.device) -> KeyTransform:
        """Factors are powers of two, as the plugin takes them from a model; with these keys and queries any will do."""
        generator = torch.Generator().manual_seed(0)
        exponents = torch.randint(-1, 2, (num_kv_heads, head_size), generator=generator)
        return KeyTransform(equalizer=torch.exp2(exponents.float()).to(device))

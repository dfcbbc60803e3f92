"""The pages of a KV cache as the store sees them: of every layer, what one block holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch

from vllm_int8kv.cache import ops
from vllm_int8kv.cache.formats import CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, each `[num_blocks * block_size, num_kv_heads, head_size]` fp32."""


@dataclass(frozen=True)
class PagedLayer:
    """The cache of one layer."""

    name: str
    pages: torch.Tensor
    """[num_blocks, ...], a view of the cache that begins with its blocks"""
    block_size: int
    cache_format: CacheFormat | None = None
    """None for a cache of vLLM's own, whose pages only it understands"""
    kind: str = ""
    """of a cache of vLLM's own, what decides how it lays out its pages"""
    key_transform: KeyTransform = KeyTransform()
    head_size: int = 0
    num_kv_heads: int = 0

    @property
    def page_bytes(self) -> int:
        """Of one block."""
        return self.pages[0].numel() * self.pages.element_size()

    def describe(self) -> dict[str, object]:
        """What decides the meaning of a page, beside the key equalizer."""
        return {
            "name": self.name,
            "shape": list(self.pages.shape[1:]),
            "dtype": str(self.pages.dtype),
            "format": self.kind if self.cache_format is None else self.cache_format.name,
            "rotate_keys": self.key_transform.rotate,
        }


@dataclass(frozen=True)
class _Everything:
    """All blocks of a cache as one sequence, for operators."""

    block_table: torch.Tensor
    cu_seq_lens: torch.Tensor
    seq_starts: torch.Tensor
    slot_mapping: torch.Tensor

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, num_blocks: int, block_size: int, device: torch.device) -> Self:
        num_tokens = num_blocks * block_size
        return cls(
            torch.arange(num_blocks, dtype=torch.int32, device=device)[None],
            torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            torch.arange(num_tokens, device=device),
        )


def read_pages(pages: torch.Tensor, cache_format: CacheFormat, key_transform: KeyTransform, head_size: int) -> KV:
    """Dequantize whole blocks `[num_blocks, num_kv_heads, block_size, content_bytes]`."""
    num_blocks, num_kv_heads, block_size, _ = pages.shape
    num_tokens = num_blocks * block_size
    kv = tuple(torch.empty(num_tokens, num_kv_heads, head_size, device=pages.device) for _ in range(2))
    everything = _Everything.of(num_blocks, block_size, pages.device)
    options = {"cache_format": cache_format, "key_transform": key_transform}
    ops.gather_cache(*kv, pages, everything.block_table, everything.cu_seq_lens, everything.seq_starts, **options)
    return kv


def write_pages(
    kv: KV, num_blocks: int, block_size: int, cache_format: CacheFormat, key_transform: KeyTransform
) -> torch.Tensor:
    """Quantize keys and values of whole blocks into new pages."""
    _, num_kv_heads, head_size = kv[0].shape
    shape = (num_blocks, num_kv_heads, block_size, cache_format.content_bytes(head_size))
    pages = torch.empty(shape, dtype=torch.int8, device=kv[0].device)  # every byte is written
    slots = _Everything.of(num_blocks, block_size, kv[0].device).slot_mapping
    ops.reshape_and_cache(*kv, pages, slots, cache_format=cache_format, key_transform=key_transform)
    return pages


def paged_layers(
    kv_caches: Mapping[str, torch.Tensor], layers: Mapping[str, object], num_blocks: int
) -> list[PagedLayer]:
    """The caches of an engine, each once: layers that read the cache of another have none.

    Args:
        kv_caches: by layer name, as vLLM hands them to connectors.
        layers: vLLM's attention layers by name.

    Raises:
        ValueError: a cache does not consist of blocks.
    """
    found: list[PagedLayer] = []
    seen: set[int] = set()
    for name in sorted(kv_caches):
        cache, layer = kv_caches[name], layers.get(name)
        if getattr(layer, "kv_sharing_target_layer_name", None) is not None or cache.data_ptr() in seen:
            continue
        seen.add(cache.data_ptr())
        places = [place for place, size in enumerate(cache.shape) if size == num_blocks]
        if not places:
            raise ValueError(f"the KV cache of {name}, {list(cache.shape)}, has no dimension of {num_blocks} blocks")
        pages = cache.movedim(places[0], 0)
        impl = getattr(layer, "impl", None)
        cache_format = getattr(impl, "cache_format", None)
        if isinstance(cache_format, CacheFormat):
            sizes = {"head_size": impl.head_size, "num_kv_heads": impl.num_kv_heads, "block_size": pages.shape[2]}
            # A copy of the factors: those of the layer are replaced in place when its weights change, and pages that
            # wait to be encoded were written with the old ones.
            transform = impl.key_transform
            if transform.equalizer is not None:
                transform = replace(transform, equalizer=transform.equalizer.clone())
            found.append(PagedLayer(name, pages, cache_format=cache_format, key_transform=transform, **sizes))
        else:
            found.append(PagedLayer(name, pages, block_size=0, kind=_kind_of(layer, impl)))
    return found


def _kind_of(layer: object, impl: object) -> str:
    """What decides how vLLM lays out the pages of a layer: pages of equal shape differ with AMX and without."""
    names = ("kv_cache_dtype", "isa", "_k_scale_float", "_v_scale_float")
    values = [getattr(impl, name, getattr(layer, name, None)) for name in names]
    return f"{type(impl).__name__} {values}"


def copy_out(layers: Sequence[PagedLayer], block_ids: Sequence[int]) -> list[torch.Tensor]:
    """Copies of the pages of some blocks, per layer `[len(block_ids), ...]`."""
    index = torch.tensor(block_ids, dtype=torch.long, device=layers[0].pages.device)
    return [layer.pages.index_select(0, index) for layer in layers]


def copy_in(layers: Sequence[PagedLayer], block_ids: Sequence[int], pages: Sequence[torch.Tensor]) -> None:
    """Write pages, as of `copy_out`, to blocks."""
    index = torch.tensor(block_ids, dtype=torch.long, device=layers[0].pages.device)
    for layer, own in zip(layers, pages, strict=True):
        layer.pages.index_copy_(0, index, own.view(layer.pages.dtype).reshape(-1, *layer.pages.shape[1:]))

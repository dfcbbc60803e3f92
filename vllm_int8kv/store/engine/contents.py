"""What of a block goes to its file, and how it gets back into the cache."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.pages import copy_in, copy_out


@dataclass(frozen=True)
class Block:
    """A block of the cache, and what it holds."""

    hash: str
    block_id: int
    place: int = 0
    """in its prefix"""


@dataclass(frozen=True)
class Written:
    """A block that a step writes to, full or not."""

    request_id: str
    place: int
    """in the request"""


Taken = tuple[list[Block], Sequence[torch.Tensor]]
"""Blocks, and of every layer a tensor whose first dimension are those blocks."""


class Contents(ABC):
    """What of the blocks of a worker's cache is stored.

    Args:
        codec: of what `take` returns.
        page_bytes: of a block in the cache, all layers together.
    """

    is_filled_in_step = False
    """Whether `put` may not run beside a forward pass."""

    def __init__(self, codec: Codec, page_bytes: int) -> None:
        self.codec, self.page_bytes = codec, page_bytes
        self.saves = True
        """Whether this rank saves what all of them have."""

    @property
    def block_bytes(self) -> int:
        """What `take` returns of one block."""
        return sum(layer.page_bytes for layer in self.codec.layers)

    def begin_step(self, written: Mapping[int, Written]) -> None:  # noqa: B027 pages are there when they are taken
        """A forward pass begins that writes to these blocks, by id."""

    def forget(self, request_ids: set[str]) -> None:  # noqa: B027
        """Requests have ended."""

    @abstractmethod
    def take(self, blocks: Sequence[Block]) -> Taken:
        """Copies of blocks that are full, as the cache may be overwritten; those that cannot be had are left out."""

    @abstractmethod
    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        """Fill blocks of the cache with what the codec decoded of them."""


class PageContents(Contents):
    """The pages themselves."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec, sum(layer.page_bytes for layer in codec.layers))

    def take(self, blocks: Sequence[Block]) -> Taken:
        return list(blocks), copy_out(self.codec.layers, [block.block_id for block in blocks])

    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        copy_in(self.codec.layers, [block.block_id for block in blocks], parts)

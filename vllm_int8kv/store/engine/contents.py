"""What of a block goes to its file, and how it gets back into the cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


def _no_wait() -> None:
    """For what is there already."""


class Taken(NamedTuple):
    """Copies of what blocks hold."""

    blocks: list[Block]
    parts: Sequence[torch.Tensor]
    """of every layer a tensor on the host whose first dimension are those blocks"""
    wait: Callable[[], None] = _no_wait
    """Returns when the copies have been made."""


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

    def begin_step(self, written: Mapping[int, Written], allocated: Collection[int]) -> None:  # noqa: B027
        """A forward pass begins.

        Args:
            written: blocks by id that it writes to and that may be saved; of inputs of layers only.
            allocated: ids of the blocks that requests have got for it.
        """

    def forget(self, request_ids: set[str]) -> None:  # noqa: B027
        """Requests have ended."""

    @abstractmethod
    def take(self, blocks: Sequence[Block]) -> Taken:
        """Copies of blocks that are full, as the cache may be overwritten; those that cannot be had are left out."""

    @abstractmethod
    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        """Fill blocks of the cache with what the codec decoded of them."""


class PageContents(Contents):
    """The pages themselves, of a cache on the host."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec, sum(layer.page_bytes for layer in codec.layers))

    def take(self, blocks: Sequence[Block]) -> Taken:
        return Taken(list(blocks), copy_out(self.codec.layers, [block.block_id for block in blocks]))

    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        copy_in(self.codec.layers, [block.block_id for block in blocks], parts)

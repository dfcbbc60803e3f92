"""Inputs of attention layers between the step that computes them and the one that saves their block.

They exist only while a layer is computed, and a block may take several steps to fill: chunks of a prompt, then one
token after the other.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_int8kv.store.engine.contents import Block, Written


@dataclass
class Entry:
    """What is known of a block."""

    written: Written
    place: int
    """in the pool"""
    num_tokens: int = 0
    """from the beginning of the block on"""


class Staging:
    """A pool of blocks of inputs.

    Args:
        num_layers, block_size, hidden_size: of a block.
        num_blocks: of the KV cache.
        capacity: of the pool, blocks; those beyond are not kept.
    """

    def __init__(
        self, num_layers: int, block_size: int, hidden_size: int, dtype: torch.dtype, *, num_blocks: int, capacity: int
    ) -> None:
        # The pages of memory are not touched before they are written.
        self._pool = torch.empty(capacity, num_layers, block_size, hidden_size, dtype=dtype)
        self._block_size = block_size
        self._free = list(range(capacity))[::-1]
        self._entries: dict[int, Entry] = {}
        self._place_of_block = torch.full((num_blocks,), -1)
        self._wanted: list[int] = []
        self._rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def begin_step(self, written: Mapping[int, Written]) -> None:
        """The next forward pass writes to these blocks, by id; what it writes to others is not kept."""
        self._place_of_block[self._wanted] = -1
        self._wanted, self._rows = [], None
        for block_id, block in written.items():
            entry = self._entries.get(block_id)
            if entry is None or entry.written != block:
                self._drop(block_id)
                if not self._free:
                    continue
                entry = self._entries[block_id] = Entry(block, self._free.pop())
            self._place_of_block[block_id] = entry.place
            self._wanted.append(block_id)

    def add(self, layer: int, x: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Keep the inputs of a layer.

        Args:
            x: [num_tokens, hidden_size]; rows beyond the slots are padding.
            slot_mapping: of all layers of the step, [num_tokens], negative for rows that are not written.
        """
        if not self._wanted:
            return
        if self._rows is None:
            self._rows = self._find_rows(slot_mapping)
        rows, places, offsets = self._rows
        self._pool[places, layer, offsets] = x[rows]

    def take(self, blocks: Sequence[Block]) -> tuple[list[Block], torch.Tensor]:
        """Full blocks and copies of their inputs `[len(blocks), num_layers, block_size, hidden_size]`."""
        found, places = [], []
        for block in blocks:
            entry = self._entries.get(block.block_id)
            if entry is None or entry.written.place != block.place or entry.num_tokens < self._block_size:
                continue
            found.append(block)
            places.append(entry.place)
        taken = self._pool[places]
        for block in found:
            self._drop(block.block_id)
        return found, taken

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop what requests have left."""
        for block_id in [i for i, entry in self._entries.items() if entry.written.request_id in request_ids]:
            self._drop(block_id)

    def _drop(self, block_id: int) -> None:
        if (entry := self._entries.pop(block_id, None)) is not None:
            self._free.append(entry.place)

    def _find_rows(self, slot_mapping: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the step that are kept, and where: places in the pool and offsets in the block."""
        slots = slot_mapping.long()
        offsets = slots % self._block_size
        places = torch.where(slots < 0, -1, self._place_of_block[slots.clamp_min(0) // self._block_size])
        rows = (places >= 0).nonzero().flatten()
        places, offsets = places[rows], offsets[rows]
        ends: dict[int, list[int]] = {}
        for place, offset in zip(places.tolist(), offsets.tolist(), strict=True):
            first, _ = ends.setdefault(place, [offset, offset])
            ends[place] = [first, offset + 1]
        for block_id in self._wanted:
            entry = self._entries[block_id]
            # Tokens that were drafted and refused are computed again. A block whose beginning was never seen, as when
            # another engine computed it, is never full.
            first, end = ends.get(entry.place, (self._block_size, 0))
            if first <= entry.num_tokens:
                entry.num_tokens = end
        return rows, places, offsets

"""The scheduler's side of the store: which blocks of a request are stored, to be loaded, or worth saving."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

from vllm_int8kv.store import namespace as names
from vllm_int8kv.store.engine.contents import Block, Written
from vllm_int8kv.store.index import Index


@dataclass
class Tracked:
    """A request that is waiting or running."""

    request: Any
    hashes: list[str] = field(default_factory=list)
    """of its full blocks, as far as somebody asked"""
    next_mm_idx: int = 0
    first_block: int = 0
    """where the load begins that was offered last"""
    num_saved: int = 0
    """blocks at its beginning that are stored or on their way"""
    has_hole: bool = False
    """a block of it was not saved, so that nobody would find the ones behind it"""


class Lookups:
    """Requests of one scheduler and what the folder has of them."""

    def __init__(self, index: Index, block_size: int, num_ranks: int) -> None:
        self.index = index
        self._num_ranks = num_ranks
        self._block_size = block_size
        self._tracked: dict[str, Tracked] = {}
        self._loads: dict[str, list[Block]] = {}
        self._saving: dict[str, int] = {}
        """Blocks that workers are writing, and how many ranks have."""
        self._touches: list[list[str]] = []
        self._adapters: dict[str, str] = {}
        """Fingerprints of LoRA adapters, by path and the state of their files."""

    def add_request(self, request: Any) -> Tracked:
        """Begin to follow a request."""
        return self._tracked.setdefault(request.request_id, Tracked(request))

    def remove_request(self, request_id: str) -> None:
        """A request has finished; vLLM keeps its blocks until a load that is on its way has ended."""
        if (tracked := self._tracked.pop(request_id, None)) is not None and tracked.num_saved:
            self._touches.append(tracked.hashes[: tracked.num_saved])

    def take_touches(self) -> list[list[str]]:
        """Prefixes that were used."""
        taken, self._touches = self._touches, []
        return taken

    def num_stored_tokens(self, request: Any, num_computed_tokens: int) -> int:
        """Tokens behind the computed ones whose blocks are all stored."""
        tracked = self.add_request(request)
        first = num_computed_tokens // self._block_size
        hashes = self._hashes(tracked, request.num_tokens // self._block_size)
        end = first
        while end < len(hashes) and self.index.has(hashes[end]):
            end += 1
        tracked.first_block = first
        return max(0, end * self._block_size - num_computed_tokens)

    def load(self, request: Any, block_ids: list[int], num_tokens: int) -> None:
        """Load the tokens that were offered last into the blocks that the request has."""
        tracked = self._tracked[request.request_id]
        places = range(tracked.first_block, tracked.first_block + num_tokens // self._block_size)
        self._loads[request.request_id] = [Block(tracked.hashes[place], block_ids[place], place) for place in places]

    def take_loads(self) -> dict[str, list[Block]]:
        """What is to be loaded, by request."""
        taken, self._loads = self._loads, {}
        return taken

    def find_written(self, scheduler_output: Any) -> dict[int, Written]:
        """Blocks that a step writes to and that may be saved when they are full, by id."""
        state, found = scheduler_output.kv_connector_block_state, {}
        for request_id, tracked, begin, end in self._scheduled(scheduler_output):
            block_ids = state.get_block_ids(request_id)[0]
            first = max(begin // self._block_size, tracked.num_saved)
            for place in range(first, -(-end // self._block_size)):
                found[block_ids[place]] = Written(request_id, place)
        return found

    def find_saves(self, scheduler_output: Any) -> list[Block]:
        """Blocks that a step fills and that are not stored."""
        state, found = scheduler_output.kv_connector_block_state, []
        for request_id, tracked, _, end in self._scheduled(scheduler_output):
            num_blocks = _num_settled_tokens(tracked.request, end) // self._block_size
            if num_blocks <= tracked.num_saved:
                continue
            block_ids = state.get_block_ids(request_id)[0]
            hashes = self._hashes(tracked, num_blocks)
            for place in range(tracked.num_saved, len(hashes)):
                block = hashes[place]
                if block not in self._saving and not self.index.has(block):
                    self._saving[block] = 0
                    found.append(Block(block, block_ids[place], place))
            tracked.num_saved = len(hashes)
        return found

    def _scheduled(self, scheduler_output: Any) -> Iterator[tuple[str, Tracked, int, int]]:
        """Requests of a step whose blocks are worth saving, and their tokens before and after it."""
        computed = {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        cached = scheduler_output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, num_scheduled in scheduler_output.num_scheduled_tokens.items():
            if (tracked := self._tracked.get(request_id)) is not None and not tracked.has_hole:
                yield request_id, tracked, computed[request_id], computed[request_id] + num_scheduled

    def note(self, saved: Mapping[str, int], unsaved: Collection[str]) -> None:
        """Blocks were written by so many ranks more, or not by one of them."""
        for block, count in saved.items():
            self._saving[block] = self._saving.get(block, 0) + count
            if self._saving[block] >= self._num_ranks:
                del self._saving[block]
                self.index.add(block)
        for block in unsaved:
            self._saving.pop(block, None)
            self.index.forget(block)
        if unsaved:
            for tracked in self._tracked.values():
                tracked.has_hole = tracked.has_hole or not unsaved.isdisjoint(tracked.hashes)

    def _hashes(self, tracked: Tracked, num_blocks: int) -> list[str]:
        """The hashes of the first blocks of a request; none if nothing tells its adapter from others."""
        request, hashes = tracked.request, tracked.hashes
        while len(hashes) < num_blocks:
            begin = len(hashes) * self._block_size
            end = begin + self._block_size
            keys, tracked.next_mm_idx = generate_block_hash_extra_keys(request, begin, end, tracked.next_mm_idx)
            if request.lora_request is not None:
                if (adapter := self._adapter(request.lora_request.lora_path)) is None:
                    break
                keys = (*keys, adapter)
            parent = hashes[-1] if hashes else ""
            hashes.append(names.block_hash(parent, request.all_token_ids[begin:end], keys))
        return hashes[:num_blocks]

    def _adapter(self, path: str) -> str | None:
        """A fingerprint of an adapter, whose name and path may stand for another one tomorrow; None if it is in no
        folder, as those that vLLM downloads from a hub, and then nothing of its requests is stored."""
        folder = Path(path).expanduser()
        if not folder.is_dir():
            return None
        status = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
        key = f"{path} {status}"
        if key not in self._adapters:
            try:
                self._adapters[key] = names.folder_fingerprint(folder)
            except ValueError:
                return None
        return self._adapters[key]


def allocated_blocks(scheduler_output: Any) -> set[int]:
    """Ids of the blocks that requests have got for a step."""
    got = [new.block_ids for new in scheduler_output.scheduled_new_reqs]
    got += filter(None, scheduler_output.scheduled_cached_reqs.new_block_ids)
    return {block_id for (block_ids,) in got for block_id in block_ids}


def _num_settled_tokens(request: Any, num_tokens: int) -> int:
    """Tokens whose keys and values are final after a step that computes `num_tokens` in all.

    Of drafted tokens some may be refused, and are computed again. Of an answer, all tokens before the last one known
    are settled.
    """
    if num_tokens <= request.num_prompt_tokens:
        return num_tokens
    return min(num_tokens, request.num_tokens - 1)

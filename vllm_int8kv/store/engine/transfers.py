"""Threads of a worker that carry blocks between the cache and the folder, beside the steps of the engine."""

import contextlib
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_int8kv.store import files
from vllm_int8kv.store.engine.contents import Block, Contents, Taken
from vllm_int8kv.store.engine.threads import run_alone
from vllm_int8kv.store.files import BadFile, Header, MissingFile
from vllm_int8kv.store.index import Evictor, touch

BATCH_BYTES = 8 << 20
"""Of the cache that are encoded or decoded together. With much less, operators would spend most of their time on being
called; with more, they work on memory that nobody has used yet: 32 blocks of 1.1 MB took the first batch of an engine
ten times as long as the next ones."""
READY_BATCHES = 2
"""Of blocks that have been read and decoded and wait to be filled."""
ENDING_SECONDS = 0.1
"""How long a thread waits before it looks whether it should end."""

Found = tuple[Sequence[Block], Sequence[torch.Tensor], int]
"""Blocks, what was decoded of them by layer, and the bytes of their payloads."""


@dataclass(frozen=True)
class Finished:
    """All blocks of a request have been read."""

    request_id: str
    since: float
    """when the load began"""


Ready = Found | Finished


@dataclass
class Outcome:
    """What happened since somebody asked."""

    finished_loads: set[str] = field(default_factory=set)
    """ids of requests"""
    failed_blocks: set[int] = field(default_factory=set)
    """ids of blocks that hold nothing"""
    bad_hashes: set[str] = field(default_factory=set)
    """of blocks whose files could not be used"""
    missing_hashes: set[str] = field(default_factory=set)
    """of blocks whose files are gone"""
    saved: set[str] = field(default_factory=set)
    unsaved: set[str] = field(default_factory=set)
    """dropped, or not written"""
    counts: dict[str, float] = field(default_factory=dict)
    """by the names of `stats.COUNTERS`"""
    problems: list[str] = field(default_factory=list)
    """what a log should say"""

    def count(self, name: str, value: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + value


class Transfers:
    """Loads and saves of one worker.

    Args:
        root, namespace: where the files are.
        contents: of the blocks.
        codec_name: what the files call their codec.
        max_bytes: of the whole folder; None for no limit.
        max_queued_bytes: pages that may wait to be written; what does not fit is not saved.
    """

    def __init__(
        self,
        root: Path,
        namespace: str,
        contents: Contents,
        codec_name: str,
        *,
        max_bytes: int | None,
        max_queued_bytes: int,
    ) -> None:
        self._root, self._namespace, self._codec_name = root, namespace, codec_name
        self.contents = contents
        self._evictor = Evictor(root, max_bytes)
        self._max_queued_bytes = max_queued_bytes
        self._block_bytes = contents.block_bytes
        self._batch = max(1, BATCH_BYTES // contents.page_bytes)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._outcome = Outcome()
        self._queued_bytes = 0
        self._num_loading = 0
        self._loads: queue.SimpleQueue[tuple[str, Sequence[Block], float] | None] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[Taken | Sequence[str] | None] = queue.SimpleQueue()
        """What is to be written, or hashes of blocks that were used."""
        self._ready: queue.Queue[Ready] = queue.Queue(READY_BATCHES)
        self._is_ending = threading.Event()
        runs = {"load": self._run_loads, "save": self._run_saves}
        if not contents.is_filled_in_step:
            runs["fill"] = self._run_fills
        self._threads = [
            threading.Thread(target=run_alone, args=(run,), name=f"kv-store-{name}", daemon=True)
            for name, run in runs.items()
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_bytes(self) -> int:
        """Of pages that wait to be written."""
        with self._lock:
            return self._queued_bytes

    def load(self, request_id: str, blocks: Sequence[Block]) -> None:
        """Fill blocks from their files; `take_outcome` says when."""
        with self._lock:
            self._num_loading += 1
        self._loads.put((request_id, blocks, time.monotonic()))

    def save(self, blocks: Sequence[Block]) -> None:
        """Write blocks that a step has filled to files.

        They are copied before this returns, as they may be overwritten, and encoded together, whosever they are:
        operators on a single block spend most of their time on being called. Of more than may wait, the ends of
        prefixes are left out: a block is worth nothing without the ones before it.
        """
        room = max(0, (self._max_queued_bytes - self.queued_bytes) // self._block_bytes)
        taken = self.contents.take(sorted(blocks, key=lambda block: block.place)[:room])
        dropped = {block.hash for block in blocks} - {block.hash for block in taken.blocks}
        with self._lock:
            self._queued_bytes += len(taken.blocks) * self._block_bytes
            if dropped:
                self._outcome.count("dropped_blocks", len(dropped))
                self._outcome.unsaved |= dropped
        if taken.blocks:
            self._saves.put(taken)

    def touch(self, hashes: Sequence[str]) -> None:
        """Note that all blocks of a prefix, the first one first, are used now."""
        self._saves.put(hashes)

    def fill(self, seconds: float, wait_seconds: float = 0.0) -> None:
        """Fill blocks that have been read, where only the engine's own thread may.

        Args:
            seconds: when to stop; something is done all the same.
            wait_seconds: how long to wait for the first of them, if loads are on their way.
        """
        deadline = time.monotonic() + seconds
        with self._lock:
            wait_seconds = wait_seconds if self._num_loading else 0.0
        with contextlib.suppress(queue.Empty):
            self._fill(self._ready.get(wait_seconds > 0, wait_seconds))
            while time.monotonic() < deadline:
                self._fill(self._ready.get_nowait())

    def take_outcome(self, wait_seconds: float = 0.0) -> Outcome:
        """What happened since the last call.

        Args:
            wait_seconds: how long to wait for something if loads are on their way; an idle engine that asks again and
                again would take the interpreter away from them.
        """
        with self._changed:
            if wait_seconds and self._num_loading and not self._outcome.finished_loads:
                self._changed.wait(wait_seconds)
            taken, self._outcome = self._outcome, Outcome()
        return taken

    def finish(self) -> None:
        """Write what waits, and end the threads."""
        self._is_ending.set()
        self._loads.put(None)
        self._saves.put(None)
        for thread in self._threads:
            thread.join()

    def _run_loads(self) -> None:
        while (item := self._loads.get()) is not None:
            request_id, blocks, since = item
            for begin in range(0, len(blocks), self._batch):
                batch = blocks[begin : begin + self._batch]
                try:
                    for found in self._read_batch(batch):
                        self._hand_over(found)
                except Exception as error:  # the request would wait for ever, and so would all behind it
                    self._fail_all(batch, error)
            self._hand_over(Finished(request_id, since))

    def _hand_over(self, item: Ready) -> None:
        """Let blocks be filled; waits while there are enough of them."""
        while not self._is_ending.is_set():
            with contextlib.suppress(queue.Full):
                return self._ready.put(item, timeout=ENDING_SECONDS)

    def _run_fills(self) -> None:
        while not self._is_ending.is_set():
            with contextlib.suppress(queue.Empty):
                self._fill(self._ready.get(timeout=ENDING_SECONDS))

    def _read_batch(self, blocks: Sequence[Block]) -> list[Found]:
        """What the files of some blocks hold, decoded together if that is possible."""
        found: list[tuple[Block, memoryview]] = []
        for block in blocks:
            try:
                found.append((block, self._read(block.hash)))
            except MissingFile:
                self._miss(block)
            except BadFile as error:
                self._fail(block, str(error))
        try:
            return [self._decode(found)] if found else []
        except BadFile:  # one of them is none of this codec; the others are good
            decoded = []
            for block, payload in found:
                try:
                    decoded.append(self._decode([(block, payload)]))
                except BadFile as error:
                    self._fail(block, str(error))
            return decoded

    def _decode(self, found: Sequence[tuple[Block, memoryview]]) -> Found:
        blocks, payloads = zip(*found, strict=True)
        return blocks, self.contents.codec.decode(payloads), sum(map(len, payloads))

    def _fill(self, item: Ready) -> None:
        """Put what files hold into the cache, or note that a request has all that there is for it."""
        if isinstance(item, Finished):
            with self._changed:
                self._outcome.count("load_seconds", time.monotonic() - item.since)
                self._outcome.finished_loads.add(item.request_id)
                self._num_loading -= 1
                self._changed.notify_all()
            return
        blocks, parts, num_bytes = item
        try:
            self.contents.put(blocks, parts)
        except Exception as error:
            self._fail_all(blocks, error)
            return
        with self._lock:
            self._outcome.count("loaded_blocks", len(blocks))
            self._outcome.count("loaded_bytes", num_bytes)

    def _fail_all(self, blocks: Sequence[Block], error: Exception) -> None:
        for block in blocks:
            self._fail(block, f"{type(error).__name__}: {error}")

    def _path(self, block: str) -> Path:
        return files.path_of(self._root, self._namespace, block)

    def _read(self, block: str) -> memoryview:
        expected = Header(self._namespace, block, self._codec_name, 0)
        _, payload = files.read(self._path(block), expected)
        return payload

    def _miss(self, block: Block) -> None:
        with self._lock:
            self._outcome.failed_blocks.add(block.block_id)
            self._outcome.missing_hashes.add(block.hash)
            self._outcome.count("missing_blocks")

    def _fail(self, block: Block, why: str) -> None:
        with self._lock:
            self._outcome.failed_blocks.add(block.block_id)
            self._outcome.bad_hashes.add(block.hash)
            self._outcome.count("failed_blocks")
            self._outcome.problems.append(f"{self._path(block.hash)} is computed again: {why}")

    def _run_saves(self) -> None:
        while (item := self._saves.get()) is not None:
            if not isinstance(item, Taken):
                touch(map(self._path, item), range(len(item)))
                continue
            for begin in range(0, len(item.blocks), self._batch):
                self._save_batch(item, slice(begin, begin + self._batch))

    def _save_batch(self, taken: Taken, batch: slice) -> None:
        blocks = taken.blocks[batch]
        try:
            taken.wait()
            payloads = self.contents.codec.encode([part[batch] for part in taken.parts])
            for block, payload in zip(blocks, payloads, strict=True):
                self._write(block.hash, payload)
            touch([self._path(block.hash) for block in blocks], [block.place for block in blocks])
        except Exception as error:  # a thread that died would leave all later blocks unsaved without a word
            with self._lock:
                self._outcome.count("failed_writes", len(blocks))
                self._outcome.unsaved.update(block.hash for block in blocks)
                self._outcome.problems.append(f"blocks are not saved: {type(error).__name__}: {error}")
        with self._lock:
            self._queued_bytes -= len(blocks) * self._block_bytes

    def _write(self, block: str, payload: Any) -> None:
        header = Header(self._namespace, block, self._codec_name, len(payload))
        try:
            num_bytes = files.write(self._root, header, [payload])
        except OSError as error:
            with self._lock:
                self._outcome.count("failed_writes")
                self._outcome.unsaved.add(block)
                self._outcome.problems.append(f"blocks cannot be written to {self._root}: {error}")
            return
        evicted = self._evictor.wrote(num_bytes)
        with self._lock:
            self._outcome.count("saved_blocks")
            self._outcome.count("saved_bytes", num_bytes)
            self._outcome.count("saved_page_bytes", self.contents.page_bytes)
            self._outcome.saved.add(block)
            if evicted:
                self._outcome.count("evicted_files", evicted)

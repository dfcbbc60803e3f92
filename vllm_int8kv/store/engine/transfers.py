"""Threads of a worker that carry blocks between the cache and the folder, beside the steps of the engine."""

import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_int8kv.store import files
from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.files import BadFile, Header, MissingFile
from vllm_int8kv.store.index import Evictor, touch
from vllm_int8kv.store.pages import PagedLayer, copy_in, copy_out

LOAD_BATCH = 32
"""Blocks that are decoded together: operators on one block would spend most of their time on being called."""


@dataclass(frozen=True)
class Block:
    """A block of the cache, and what it holds."""

    hash: str
    block_id: int
    place: int = 0
    """in its prefix"""


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
        codec: of the layers.
        codec_name: what the files call it.
        max_bytes: of the whole folder; None for no limit.
        max_queued_bytes: pages that may wait to be written; what does not fit is not saved.
    """

    def __init__(
        self,
        root: Path,
        namespace: str,
        codec: Codec,
        codec_name: str,
        *,
        max_bytes: int | None,
        max_queued_bytes: int,
    ) -> None:
        self._root, self._namespace, self._codec, self._codec_name = root, namespace, codec, codec_name
        self._evictor = Evictor(root, max_bytes)
        self._max_queued_bytes = max_queued_bytes
        self._page_bytes = sum(layer.page_bytes for layer in codec.layers)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._outcome = Outcome()
        self._queued_bytes = 0
        self._num_loading = 0
        self._loads: queue.SimpleQueue[tuple[str, Sequence[Block], float] | None] = queue.SimpleQueue()
        self._saves: queue.SimpleQueue[Any] = queue.SimpleQueue()
        """Blocks with copies of their pages, or hashes of blocks that were used."""
        self._threads = [
            threading.Thread(target=run, name=f"kv-store-{name}", daemon=True)
            for name, run in (("load", self._run_loads), ("save", self._run_saves))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def layers(self) -> Sequence[PagedLayer]:
        return self._codec.layers

    def load(self, request_id: str, blocks: Sequence[Block]) -> None:
        """Fill blocks from their files; `take_outcome` says when."""
        with self._lock:
            self._num_loading += 1
        self._loads.put((request_id, blocks, time.monotonic()))

    def save(self, blocks: Sequence[Block]) -> None:
        """Write blocks of one request to files. Their pages are copied before this returns, as they may be overwritten.

        Of more than may wait, the ends of prefixes are left out: a block is worth nothing without the ones before it.
        """
        with self._lock:
            room = max(0, (self._max_queued_bytes - self._queued_bytes) // self._page_bytes)
            kept, dropped = blocks[:room], blocks[room:]
            self._queued_bytes += len(kept) * self._page_bytes
            if dropped:
                self._outcome.count("dropped_blocks", len(dropped))
                self._outcome.unsaved.update(block.hash for block in dropped)
        if kept:
            self._saves.put((kept, copy_out(self.layers, [block.block_id for block in kept])))

    def touch(self, hashes: Sequence[str]) -> None:
        """Note that all blocks of a prefix, the first one first, are used now."""
        self._saves.put(hashes)

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
        self._loads.put(None)
        self._saves.put(None)
        for thread in self._threads:
            thread.join()

    def _run_loads(self) -> None:
        while (item := self._loads.get()) is not None:
            request_id, blocks, since = item
            for begin in range(0, len(blocks), LOAD_BATCH):
                batch = blocks[begin : begin + LOAD_BATCH]
                try:
                    self._load_batch(batch)
                except Exception as error:  # the request would wait for ever, and so would all behind it
                    for block in batch:
                        self._fail(block, f"{type(error).__name__}: {error}")
            with self._changed:
                self._outcome.count("load_seconds", time.monotonic() - since)
                self._outcome.finished_loads.add(request_id)
                self._num_loading -= 1
                self._changed.notify_all()

    def _load_batch(self, blocks: Sequence[Block]) -> None:
        found: list[tuple[Block, memoryview]] = []
        for block in blocks:
            try:
                found.append((block, self._read(block.hash)))
            except MissingFile:
                self._miss(block)
            except BadFile as error:
                self._fail(block, str(error))
        try:
            self._fill(found)
        except BadFile:  # one of them is none of this codec; the others are good
            for pair in found:
                try:
                    self._fill([pair])
                except BadFile as error:
                    self._fail(pair[0], str(error))

    def _fill(self, found: Sequence[tuple[Block, memoryview]]) -> None:
        """Decode payloads into their blocks, all of them or none.

        Raises:
            BadFile: a payload is none of the codec.
        """
        if not found:
            return
        pages = self._codec.decode([payload for _, payload in found])
        copy_in(self.layers, [block.block_id for block, _ in found], pages)
        with self._lock:
            self._outcome.count("loaded_blocks", len(found))
            self._outcome.count("loaded_bytes", sum(len(payload) for _, payload in found))

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
            if isinstance(item, list):
                touch(map(self._path, item))
                continue
            blocks, pages = item
            try:
                payloads = self._codec.encode(pages)
                for block, payload in zip(blocks, payloads, strict=True):
                    self._write(block.hash, payload)
                touch([self._path(block.hash) for block in blocks], blocks[0].place)
            except Exception as error:  # a thread that died would leave all later blocks unsaved without a word
                with self._lock:
                    self._outcome.count("failed_writes", len(blocks))
                    self._outcome.unsaved.update(block.hash for block in blocks)
                    self._outcome.problems.append(f"blocks are not saved: {type(error).__name__}: {error}")
            with self._lock:
                self._queued_bytes -= len(blocks) * self._page_bytes

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
            self._outcome.count("saved_page_bytes", self._page_bytes)
            self._outcome.saved.add(block)
            if evicted:
                self._outcome.count("evicted_files", evicted)

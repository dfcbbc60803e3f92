"""Which blocks the folder holds, and which of them go when it is full.

The folder itself is the index: other engines add and remove files at any time. A file's modification time is when its
block was last used, which survives restarts and is the same for all engines.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_int8kv.store import files

MISS_SECONDS = 1.0
"""How long a block that was not there counts as absent: a waiting request asks in every step."""
KEPT_SHARE = 0.9
"""What is left of `max_bytes` when something had to go, so that not every write looks at the whole folder."""
RESCAN_SHARE = 0.05
"""Of `max_bytes`, what an engine writes before it looks at the whole folder again: others write too."""
STALE_SECONDS = 3600.0
"""Temporary files that are older were left by a process that was killed."""
CHAIN_STEP_SECONDS = 1e-3
"""By how much a block counts as used before the one in front of it, so that the ends of prefixes go first."""


class Index:
    """What one engine knows of one namespace of the folder."""

    def __init__(self, root: Path, namespaces: Sequence[str]) -> None:
        self._root, self._namespaces = root, tuple(namespaces)
        """A block must be there for every rank, each of which has a namespace."""
        self._present: set[str] = set()
        self._absent: dict[str, float] = {}
        """Until when a block counts as absent."""

    def has(self, block: str) -> bool:
        """Whether all ranks' files of a block exist."""
        if block in self._present:
            return True
        if self._absent.get(block, 0.0) > time.monotonic():
            return False
        # Not `Path.exists`, which raises where a folder may not be read or a network file system does not answer.
        paths = (files.path_of(self._root, namespace, block) for namespace in self._namespaces)
        if all(map(os.path.exists, paths)):
            self.add(block)
            return True
        self._absent[block] = time.monotonic() + MISS_SECONDS
        if len(self._absent) > 1 << 16:
            now = time.monotonic()
            self._absent = {name: until for name, until in self._absent.items() if until > now}
        return False

    def add(self, block: str) -> None:
        """Note that a block was written."""
        self._present.add(block)
        self._absent.pop(block, None)

    def forget(self, block: str, seconds: float = MISS_SECONDS) -> None:
        """Note that a block is not there after all, for a while: a broken file would be asked for again and again."""
        self._present.discard(block)
        self._absent[block] = time.monotonic() + seconds


def touch(paths: Iterable[Path], places: Iterable[int]) -> None:
    """Note that blocks are used now.

    Args:
        places: of each in its prefix.
    """
    now = time.time()
    for path, place in zip(paths, places, strict=True):
        try:
            os.utime(path, (now, now - place * CHAIN_STEP_SECONDS))
        except OSError:  # evicted by another engine, or a folder that may only be read
            continue


@dataclass(frozen=True)
class StoredFile:
    """A file of the folder."""

    path: Path
    num_bytes: int
    used: float
    """seconds since the epoch"""


def stored_files(root: Path) -> Iterator[StoredFile]:
    """All files of all namespaces, those that were not written to the end as well."""
    for folder, _, names in os.walk(root):
        for name in names:
            if not name.endswith((files.SUFFIX, files.TEMPORARY_SUFFIX)):
                continue
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:  # gone meanwhile
                continue
            yield StoredFile(Path(folder, name), status.st_size, status.st_mtime)


class Evictor:
    """Keeps the folder below `max_bytes`; all engines of a folder may have one."""

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._num_bytes: int | None = None
        """What is in the folder as far as this engine knows."""
        self._own_bytes = 0
        """What it wrote since it looked."""

    def wrote(self, num_bytes: int) -> int:
        """Note a written file, and make room if the folder is full; returns how many files had to go."""
        if self._max_bytes is None:
            return 0
        self._own_bytes += num_bytes
        if self._num_bytes is not None:
            self._num_bytes += num_bytes
            if self._num_bytes <= self._max_bytes and self._own_bytes < RESCAN_SHARE * self._max_bytes:
                return 0
        removed, self._num_bytes = collect(self._root, self._max_bytes)
        self._own_bytes = 0
        return removed


def collect(root: Path, max_bytes: int) -> tuple[int, int]:
    """Remove the files that were used longest ago if they take more than `max_bytes`, and what killed writers left.

    Returns:
        How many were removed, and how many bytes are left.
    """
    removed, kept = 0, []
    for file in stored_files(root):
        if file.path.name.endswith(files.TEMPORARY_SUFFIX):
            if file.used < time.time() - STALE_SECONDS:
                removed += _remove(file)
        else:
            kept.append(file)
    num_bytes = sum(file.num_bytes for file in kept)
    if num_bytes > max_bytes:
        for file in sorted(kept, key=lambda file: file.used):
            if num_bytes <= KEPT_SHARE * max_bytes:
                break
            removed += _remove(file)
            num_bytes -= file.num_bytes
    return removed, num_bytes


def _remove(file: StoredFile) -> int:
    try:
        file.path.unlink()
    except OSError:  # another engine was faster
        return 0
    return 1

"""A folder in parts that are small enough to travel one by one, and back.

The folder becomes one tar file; each part is a stretch of it, compressed by itself, so that the machine on the other
side can unpack a part while the next one is on its way. It needs nothing but Python for that.
"""

import hashlib
import json
import lzma
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import RawIOBase
from pathlib import Path

MANIFEST = "manifest.json"
PART_BYTES = 50 << 20
"""Beside the tracked files, 10 MB, this fits where 64 MiB may travel at once."""
PIECE_BYTES = 1 << 20
HELD_BACK_BYTES = 64 << 10
"""What a compressor has taken and not yet written."""


class DamagedError(RuntimeError):
    """A part is missing or not the one that was sent."""


@dataclass(frozen=True)
class Part:
    """A file with its size and checksum."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was packed, of which commit."""

    commit: str
    parts: list[Part]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        fields = json.loads((folder / MANIFEST).read_text())
        return cls(fields["commit"], [Part(**part) for part in fields["parts"]])

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2))


class _PartWriter(RawIOBase):
    """A file to write a tar to, which ends up in parts."""

    def __init__(self, folder: Path, limit: int, preset: int) -> None:
        self.parts: list[Path] = []
        self._folder, self._preset = folder, preset
        self._piece = min(PIECE_BYTES, limit // 16)
        self._full = limit - 2 * self._piece - HELD_BACK_BYTES
        self._begin()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        for first in range(0, len(view), self._piece):
            if self._file.tell() > self._full:
                self.finish()
                self._begin()
            self._file.write(self._compressor.compress(view[first : first + self._piece]))
        return len(view)

    def finish(self) -> None:
        self._file.write(self._compressor.flush())
        self._file.close()

    def _begin(self) -> None:
        self.parts.append(self._folder / f"part-{len(self.parts):02}.xz")
        self._file = self.parts[-1].open("wb")
        self._compressor = lzma.LZMACompressor(preset=self._preset)


class _Chain(RawIOBase):
    """Files one after the other as one to read."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: Iterator = (path.open("rb") for path in paths)
        self._file = next(self._files)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        while self._file is not None:
            if count := self._file.readinto(buffer):
                return count
            self._file.close()
            self._file = next(self._files, None)
        return 0


def cut(tree: Path, folder: Path, limit: int = PART_BYTES, preset: int = 6) -> list[Part]:
    """Write what is in `tree` into parts of at most `limit` bytes in `folder`, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = _PartWriter(folder, limit, preset)
    with tarfile.open(mode="w|", fileobj=writer, bufsize=PIECE_BYTES) as tar:
        for path in sorted(tree.iterdir()):
            tar.add(path, path.name)
    writer.finish()
    return [Part(path.name, path.stat().st_size, _sha256(path)) for path in writer.parts]


def receive(part: Part, folder: Path, store: Path) -> None:
    """Decompress a part that has arrived in `folder` into `store`.

    Raises:
        DamagedError: it is not there, or not as it was sent.
    """
    path = folder / part.name
    if not path.is_file():
        raise DamagedError(f"{path} is not there")
    if path.stat().st_size != part.num_bytes or _sha256(path) != part.sha256:
        raise DamagedError(f"{path} is not the file that the manifest names")
    store.mkdir(parents=True, exist_ok=True)
    partial = store / f"{part.name}.partial"
    with lzma.open(path) as compressed, partial.open("wb") as file:
        shutil.copyfileobj(compressed, file, PIECE_BYTES)
    partial.rename(_stretch(part, store))


def join(parts: list[Part], store: Path, tree: Path) -> None:
    """Unpack the tar that the received parts make into `tree`.

    Raises:
        DamagedError: some have not been received.
    """
    paths = [_stretch(part, store) for part in parts]
    if missing := [path.stem for path in paths if not path.is_file()]:
        raise DamagedError(f"not received: {', '.join(missing)}")
    tree.mkdir(parents=True, exist_ok=True)
    with tarfile.open(mode="r|", fileobj=_Chain(paths), bufsize=PIECE_BYTES) as tar:
        tar.extractall(tree, filter="tar")
    for path in paths:
        path.unlink()


def _stretch(part: Part, store: Path) -> Path:
    return store / f"{part.name.removesuffix('.xz')}.tar"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

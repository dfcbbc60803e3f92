"""The files of the store: one per block and rank, written as a whole or not at all, and read with every byte checked.

    <path>/<namespace>/<first two digits of the block's hash>/<hash>.kv

    magic and version  8 bytes
    header length      4 bytes, little endian
    header             JSON: namespace, block, codec, num_bytes of the payload
    payload            what the codec made of the pages of all layers
    digest             16 bytes of BLAKE3 over everything before

What does not match what its reader expects raises `BadFile`, which is a miss, never an answer.
"""

import json
import os
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from blake3 import blake3

MAGIC = b"INT8KV\x00\x01"
"""The last byte is the version of the layout of the file."""
SUFFIX = ".kv"
TEMPORARY_SUFFIX = ".tmp"
DIGEST_BYTES = 16


class BadFile(Exception):
    """A file is not what was expected; the message says why."""


class MissingFile(BadFile):
    """There is none: it was evicted."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself."""

    namespace: str
    """everything that decides what its bytes mean, as a digest"""
    block: str
    """hash of the tokens of the block and of all before it, hexadecimal"""
    codec: str
    num_bytes: int
    """of the payload"""

    def encode(self) -> bytes:
        """The bytes before the payload."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        return MAGIC + struct.pack("<I", len(text)) + text

    @classmethod
    def decode(cls, data: bytes | memoryview) -> tuple[Self, int]:
        """The header at the beginning of a file, and where the payload begins.

        Raises:
            BadFile: there is none, or one of another version.
        """
        if bytes(data[:6]) != MAGIC[:6]:
            raise BadFile("it is no file of the store")
        if len(data) < 12:
            raise BadFile("it is cut off")
        if bytes(data[6:8]) != MAGIC[6:]:
            raise BadFile(f"its version is {data[7]}, expected {MAGIC[7]}")
        begin = 12 + struct.unpack("<I", data[8:12])[0]
        try:
            found = cls(**json.loads(bytes(data[12:begin])))
        except (ValueError, TypeError) as error:
            raise BadFile(f"its header cannot be read ({error})") from None
        if not isinstance(found.num_bytes, int) or found.num_bytes < 0:
            raise BadFile(f"its header cannot be read (num_bytes is {found.num_bytes!r})")
        return found, begin


def path_of(root: Path, namespace: str, block: str) -> Path:
    """Where the file of a block is."""
    return root / namespace / block[:2] / f"{block}{SUFFIX}"


def write(root: Path, header: Header, payload: Sequence[bytes | memoryview]) -> int:
    """Write a file, so that readers see all of it or nothing; returns its size in bytes.

    Raises:
        OSError: the folder cannot be written, or is full; nothing is left behind.
    """
    path = path_of(root, header.namespace, header.block)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = header.encode()
    digest = blake3(head)
    for part in payload:
        digest.update(part)
    # Processes of several containers may have the same number.
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(head)
            file.writelines(payload)
            file.write(digest.digest(length=DIGEST_BYTES))
        size = temporary.stat().st_size
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def read(path: Path, header: Header | None = None) -> tuple[Header, memoryview]:
    """The header and the payload of a file.

    Args:
        header: what the file must say of itself; `num_bytes` may differ, as codecs have payloads of many lengths.

    Raises:
        MissingFile: there is none.
        BadFile: it is unreadable, cut off, changed, or another one than expected.
    """
    try:
        data = memoryview(path.read_bytes())
    except FileNotFoundError:
        raise MissingFile("it is gone") from None
    except OSError as error:
        raise BadFile(f"it cannot be read ({error.strerror})") from None
    found, begin = Header.decode(data)
    end = begin + found.num_bytes
    if len(data) != end + DIGEST_BYTES:
        raise BadFile(f"it has {len(data)} bytes, expected {end + DIGEST_BYTES}")
    if blake3(data[:end]).digest(length=DIGEST_BYTES) != data[end:]:
        raise BadFile("its checksum does not match its bytes")
    if header is not None:
        for name in ("namespace", "block", "codec"):
            if getattr(found, name) != getattr(header, name):
                raise BadFile(f"its {name} is {getattr(found, name)}, expected {getattr(header, name)}")
    return found, data[begin:end]

"""What two engines must have in common to read each other's blocks.

A page says nothing of what it means, so everything that decides it is part of a digest, which is the name of a folder:
another format, layer policy, dtype, block size, codec, number of ranks or model is another folder, and never a wrong
answer. Blocks are found by a hash of their tokens and of all before them, with what else changes them: LoRA, images, a
salt. Unlike vLLM's own hashes it does not depend on the process (`PYTHONHASHSEED`) or on the hash function chosen.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blake3 import blake3

LAYOUT_VERSION = 6
"""Raised whenever the same description stands for other bytes."""
DIGEST_BYTES = 16
DESCRIPTION = "namespace.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".tensors")
"""Suffixes of files that hold weights; with `.json` beside them all is said of a model."""
SAMPLES, SAMPLE_BYTES = 32, 1 << 12
"""Of every file of weights: it would take minutes to read all of them."""


def digest(description: Any) -> str:
    """A name for anything that is JSON."""
    return blake3(json.dumps(description, sort_keys=True).encode()).hexdigest(length=DIGEST_BYTES)


def write_description(folder: Path, description: Mapping[str, Any]) -> None:
    """Say in a namespace's folder, for people, what it is; it decides nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def read_description(folder: Path) -> dict[str, Any]:
    """What `write_description` wrote of a namespace: model, codec, formats, block size and rank; `?` if it is lost."""
    known: dict[str, Any] = {"model": "?", "codec": "?", "formats": "?", "block_size": 0, "rank": "?"}
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return known
    return known | {name: found[name] for name in known.keys() & found.keys()}


def block_hash(parent: str, token_ids: Sequence[int], extra_keys: Any) -> str:
    """The hash of a block.

    Args:
        parent: of the block before it; empty for the first one.
        token_ids: of the block, all of them.
        extra_keys: what else decides its keys and values; anything whose `repr` is the same in every process.
    """
    hashed = blake3(parent.encode())
    hashed.update(b"".join(int(token).to_bytes(4, "little") for token in token_ids))
    if extra_keys is not None:
        hashed.update(repr(extra_keys).encode())
    return hashed.hexdigest(length=DIGEST_BYTES)


def folder_fingerprint(folder: Path) -> str:
    """A name for the files of a model, or an adapter, from their sizes and samples of their bytes.

    Training changes nearly every weight, so samples tell two checkpoints of one model apart.

    Raises:
        ValueError: there are no weights, which would make all of them equal.
    """
    paths = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if p.suffix in (*WEIGHTS, ".json"))
    if not any(path.suffix in WEIGHTS for path in paths):
        raise ValueError(f"there are no weights in {folder}")
    hashed = blake3()
    for path in paths:
        size = path.stat().st_size
        hashed.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for begin in _sample_places(size):
                file.seek(begin)
                hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest(length=DIGEST_BYTES)


def _sample_places(size: int) -> Iterable[int]:
    if size <= SAMPLES * SAMPLE_BYTES:
        return range(0, size, SAMPLE_BYTES)
    return (place * (size - SAMPLE_BYTES) // (SAMPLES - 1) for place in range(SAMPLES))


def model_identity(model: str, revision: str | None, load_format: str, seed: int) -> list[str]:
    """What tells a model's weights apart.

    Raises:
        ValueError: nothing does.
    """
    if load_format == "dummy":
        return ["random weights", str(seed)]
    path = Path(model)
    if not path.exists():
        path = _downloaded(model, revision)
    try:
        return [folder_fingerprint(path)]
    except ValueError as error:
        raise ValueError(f"KVStoreConnector cannot tell the weights of {model!r} from others: {error}") from None


def _downloaded(model: str, revision: str | None) -> Path:
    """Where a model of the hub lies on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError, OSError) as error:
        raise ValueError(
            f"KVStoreConnector cannot tell the weights of {model!r} from others of the same name: they are in no "
            f"folder of this machine ({error})"
        ) from None

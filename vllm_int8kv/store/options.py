"""The options of the store: `kv_connector_extra_config` of vLLM's `kv_transfer_config`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from vllm_int8kv.store.registry import EXACT, check_codec

MIN_BYTES = 1 << 20


@dataclass(frozen=True)
class StoreOptions:
    """Checked."""

    path: str
    """The folder, made if it does not exist; engines on any machine may share it."""
    max_bytes: int | None = None
    """What all files in it may take; blocks that were used longest ago go first. None for no limit."""
    codec: str = EXACT
    """exact, the name of a cache format, or bound:R; +zstd behind the first two compresses further."""
    max_queued_bytes: int = 1 << 30
    """Pages that may wait to be written; blocks beyond are not saved."""

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> Self:
        """Check and take the options as the user wrote them.

        Raises:
            ValueError: one is missing, unknown or wrong; names it, what was expected and what came.
        """
        known = {field.name for field in fields(cls)}
        what = "kv_connector_extra_config of KVStoreConnector"
        if unknown := sorted(options.keys() - known):
            raise ValueError(f"{what} has no option {unknown[0]!r}; expected some of {', '.join(sorted(known))}")
        path = options.get("path")
        if not isinstance(path, str) or not path:
            raise ValueError(f'{what} needs "path", the folder of the store, got {path!r}')
        for name, none_is_fine in (("max_bytes", True), ("max_queued_bytes", False)):
            value = options.get(name, getattr(cls, name))
            if value is None and none_is_fine:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < MIN_BYTES:
                raise ValueError(f'{what}: "{name}" must be a number of bytes from {MIN_BYTES:,} on, got {value!r}')
        codec = options.get("codec", EXACT)
        if not isinstance(codec, str):
            raise ValueError(f'{what}: "codec" must be a name, got {codec!r}')
        check_codec(codec)
        return cls(**options)

    @property
    def root(self) -> Path:
        return Path(self.path).expanduser()

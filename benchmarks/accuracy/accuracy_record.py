"""One measured accuracy is one JSON line in `results/accuracy/<what>.jsonl`.

As with the timings of `record.py`, lines are appended and never edited; a later one replaces an earlier one of the
same case and implementation. Accuracy does not depend on how busy the machine was, but it does on its arithmetic.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm_int8kv.evaluation import record

RESULTS = record.RESULTS / "accuracy"
SCHEMA = 1

PLAIN = "int8_custom:rotate_keys=false:equalize_keys=false"
"""Plain INT8 per (token, KV head), the quantizer of vLLM's int8_per_token_head, which does not exist on CPU."""
OURS = "int8_custom"
CACHES = {
    OURS: "`int8_custom`",
    PLAIN: "plain INT8 per (token, head)",
    "fp8": "vLLM `fp8` (e4m3)",
}
"""How tables name the caches."""
FORMATS = ("k8v8", "k8v6", "k8v4", "k6v6", "k6v5", "k6v4", "k5v4", "k4v4")
"""The cache formats of the table, most bits first."""


@dataclass(frozen=True, kw_only=True)
class AccuracyRecord:
    """One line."""

    schema: int = SCHEMA
    what: str
    """the file it belongs to: engine, formats, schemes or layers"""
    case: dict
    """model, texts, sizes, dtypes"""
    impl: str
    """the KV cache as `vllm-int8kv eval --dtypes` names it, the cache format, the scheme, or the layer"""
    metrics: dict
    """numbers; divergences are in nats per token"""
    device: str
    torch: str
    vllm: str | None
    commit: str
    dirty: bool
    command: str
    utc: str

    def __post_init__(self) -> None:
        record.check_fields(self, SCHEMA)

    @property
    def key(self) -> tuple[str, str, str]:
        """What a later record of the same measurement shares with an earlier one."""
        return (self.what, json.dumps(self.case, sort_keys=True), self.impl)


def append(what: str, case: dict[str, Any], impl: str, metrics: dict[str, Any], results: Path = RESULTS) -> None:
    """Append a line to `results/<what>.jsonl`, with where and how it was taken."""
    line = AccuracyRecord(
        what=what, case=case, impl=impl, metrics=metrics, utc=record.utc_now(), **record.environment()
    )
    record.append(line, results)


def parse(line: str) -> AccuracyRecord:
    """Read one line. Raises ValueError for an unknown or missing field or a wrong type."""
    data, known = json.loads(line), {field.name for field in fields(AccuracyRecord)}
    if wrong := sorted(data.keys() ^ known):
        raise ValueError(f"unknown or missing fields {wrong}; expected {sorted(known)}")
    return AccuracyRecord(**data)


def read(what: str, results: Path = RESULTS) -> list[AccuracyRecord]:
    """All records of a file in the order they were taken; none if nothing of the kind was measured."""
    path = results / f"{what}.jsonl"
    return [parse(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(records: Iterable[AccuracyRecord]) -> list[AccuracyRecord]:
    """The newest record of each (what, case, impl)."""
    return list({line.key: line for line in records}.values())

"""What is recorded of a kernel as it is compiled: one JSON line per kernel and architecture in
`results/cuda/static.jsonl`.

As with the timings of `record.py`, lines are appended and never edited. Those of one run have the same time, and the
newest run of an architecture is what it is compared with, so a kernel that is no more is left out from then on.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vllm_int8kv.evaluation import record

RESULTS = record.RESULTS / "cuda"
WHAT = "static"
SCHEMA = 1
TOLERANCE = 0.02
"""Relative; a larger change has to be recorded."""
ZERO = ("spills", "local_accesses", "narrow_copies", "loop_calls")
"""Figures that must be 0 whatever is recorded: registers that do not suffice, copies of less than 16 bytes, and
subroutines in a hot loop."""

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class StaticRecord:
    """One line. Sizes are in bytes."""

    schema: int = SCHEMA
    what: str = WHAT
    kernel: str
    """what the tables call it"""
    function: str
    """the template and its arguments, as `make cuda-compile` prints them"""
    arch: str
    """the number of the architecture, as in `sm_90`"""
    nvcc: str
    figures: dict
    """`kernels.py` says what they count"""
    commit: str
    dirty: bool
    command: str
    utc: str

    def __post_init__(self) -> None:
        record.check_fields(self, SCHEMA)


def read(results: Path = RESULTS) -> list[StaticRecord]:
    """All lines in their order; none if nothing was recorded."""
    path = results / f"{WHAT}.jsonl"
    return [StaticRecord(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def newest(records: Iterable[StaticRecord], arch: str) -> dict[str, StaticRecord]:
    """By kernel, what the newest run for an architecture recorded."""
    lines = [line for line in records if line.arch == arch]
    last = max((line.utc for line in lines), default="")
    return {line.kernel: line for line in lines if line.utc == last}


def forbidden(figures: Figures) -> list[str]:
    """What no kernel may have."""
    return [f"{name} is {figures[name]:g} and must be 0" for name in ZERO if figures.get(name)]


def changes(recorded: dict[str, StaticRecord], found: dict[str, Figures], nvcc: str) -> list[str]:
    """What differs from the records of an architecture, a line each."""
    others = {line.nvcc for line in recorded.values()} - {nvcc}
    if others:
        return [f"the records are of nvcc {', '.join(sorted(others))}, this is nvcc {nvcc}: figures are not comparable"]
    lines = [f"{name}: recorded, but there is no such kernel any more" for name in recorded.keys() - found.keys()]
    lines += [f"{name}: a kernel that was never recorded" for name in found.keys() - recorded.keys()]
    for name in recorded.keys() & found.keys():
        lines += [f"{name}: {change}" for change in _changes(recorded[name].figures, found[name])]
    return sorted(lines)


def _changes(recorded: Figures, found: Figures) -> list[str]:
    lines = []
    for figure in {**recorded, **found}:
        before, now = recorded.get(figure), found.get(figure)
        if before is None or now is None:
            lines.append(f"{figure} was {before}, is {now}")
        elif abs(now - before) > TOLERANCE * abs(before):
            lines.append(f"{figure} was {before:g}, is {now:g}")
    return lines

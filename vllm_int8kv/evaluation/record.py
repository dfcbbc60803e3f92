"""One measured case is one JSON line in `results/<what>.jsonl`; every number in README comes from such a line.

Lines are appended by the benchmarks, never edited. A later line replaces an earlier one of the same case,
implementation, thread count and device, so a report shows the newest measurement and git keeps the others.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from vllm_int8kv.evaluation.machine import vllm_distribution

_REPOSITORY = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (_REPOSITORY / "csrc").is_dir()
ROOT = _REPOSITORY if IS_CHECKOUT else Path.cwd()
"""The checkout that this package is part of; of an installed package, the working directory."""
RESULTS = ROOT / "benchmarks" / "results" if IS_CHECKOUT else ROOT / "int8kv_results"
"""Where records go unless another folder is named."""
SCHEMA = 1
COMMIT_VARIABLE = "INT8KV_COMMIT"
GENERATED = ("benchmarks/results", "benchmarks/plots")
"""What a benchmark or a report writes: changes there do not make a measurement dirty."""

ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8")


class Device(StrEnum):
    """Where kernels and engines run."""

    cpu = "cpu"
    cuda = "cuda"


LABELS = {"int8_custom": "int8_custom", "auto": "vLLM bf16 (auto)", "fp8": "vLLM fp8"}
"""How tables and plots name an implementation."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One line. Units are in the names; GB are 1e9 bytes."""

    schema: int = SCHEMA
    what: str
    """the file it belongs to: decode, isa, formats, fp32, verify, prefill, write, read_bandwidth, end_to_end, quantize,
    quantize_error, remat, throughput, online, soak, fuzz"""
    case: dict
    """all sizes, dtypes and seeds"""
    impl: str
    """a kv_cache_dtype (int8_custom, auto, fp8), with its options in throughput and online (int8_custom:format=k6v4),
    int8_custom with an instruction set, the method for read_bandwidth, or what attention reads in remat"""
    resolved_backend: str
    """the code that really ran, with its instruction set"""
    median_us: float
    p10_us: float
    p90_us: float
    n: int
    """number of timed calls"""
    bytes_moved: int | None
    """bytes that any implementation of this format must move, scales included; None where compute bounds"""
    gb_per_s: float | None
    read_gb_per_s: float | None
    """streaming read bandwidth measured right before and after the case with as many threads"""
    frac_of_peak: float | None
    """gb_per_s / read_gb_per_s"""
    tok_per_s: float | None = None
    """output tokens per second of the whole engine, or of all replicas together"""
    metrics: dict | None = None
    """what only this kind of measurement has, units in the names"""
    checked: bool
    """matched its reference in this run; a case that does not is not recorded"""
    rel_error: float | None
    """|out - reference| / |reference| (L2), against exact attention over the values as this format stores them"""
    num_threads: int
    cpu_per_wall: float | None
    """cores in use on average; far below num_threads means that the machine was shared"""
    device: str
    driver: str | None = None
    cuda: str | None = None
    torch: str
    vllm: str | None
    commit: str
    dirty: bool
    command: str
    utc: str

    def __post_init__(self) -> None:
        check_fields(self, SCHEMA)
        if not self.checked:
            raise ValueError(f"checked is False: {self.what} {self.impl} {self.case} may not be recorded")
        if not (0 < self.p10_us <= self.median_us <= self.p90_us and self.n >= 1):
            raise ValueError(f"times out of order: {self.p10_us}, {self.median_us}, {self.p90_us} us of {self.n}")

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What a later record of the same measurement shares with an earlier one.

        Not how many copies of the operands were there to be found cold: that follows from the size of a shared cache.
        """
        case = {name: value for name, value in self.case.items() if name != "num_copies"}
        return (self.what, json.dumps(case, sort_keys=True), self.impl, self.num_threads, self.device)


Group = dict[str, Record]
"""The records of one case with one thread count, by implementation."""


def check_fields(line: Any, schema: int) -> None:
    """Raise ValueError if a field of a dataclass is not what its annotation says, or `schema` is another."""
    for name, hint in get_type_hints(type(line)).items():
        if not isinstance(getattr(line, name), hint):
            raise ValueError(f"{name} must be {hint}, got {getattr(line, name)!r}")
    if line.schema != schema:
        raise ValueError(f"schema {line.schema} is not supported; supported: {schema}")


def of_run(environment: dict, **fields: Any) -> Record:
    """The record of something that ran as a whole: it counts no bytes and has no reference of its own."""
    uncounted = ("bytes_moved", "gb_per_s", "read_gb_per_s", "frac_of_peak", "rel_error")
    return Record(checked=True, utc=utc_now(), **dict.fromkeys(uncounted), **environment, **fields)


def parse(line: str) -> Record:
    """Read one line. Raises ValueError for an unknown or missing field or a wrong type."""
    data = json.loads(line)
    known = {field.name for field in fields(Record)}
    required = {field.name for field in fields(Record) if field.default is MISSING}
    if unknown := sorted(data.keys() - known):
        raise ValueError(f"unknown fields {unknown}; known: {sorted(known)}")
    if missing := sorted(required - data.keys()):
        raise ValueError(f"missing fields {missing}")
    return Record(**data)


def append(record: Record, results: Path = RESULTS) -> None:
    """Append a record to `results/<what>.jsonl`: the whole line, or nothing if the disk is full.

    Any dataclass with a field `what` will do; `accuracy_record` has its own.
    """
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{record.what}.jsonl"
    with path.open("ab", buffering=0) as file:
        size, line = file.tell(), (json.dumps(asdict(record)) + "\n").encode()
        try:
            while line:  # a full disk first takes a part
                line = line[file.write(line) :]
        except OSError:
            file.truncate(size)
            raise


def read(what: str, results: Path = RESULTS) -> list[Record]:
    """All records of a file in the order they were taken; none if nothing of the kind was measured."""
    path = results / f"{what}.jsonl"
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            records.append(parse(line))
        except ValueError as error:
            raise ValueError(f"{path.name}:{number}: {error}") from error
    return records


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each (what, case, impl, num_threads, device)."""
    return list({record.key: record for record in records}.values())


def by_device(records: Iterable[Record]) -> dict[str, list[Group]]:
    """The newest records of each case and number of threads, by device in the order of first records."""
    found: dict[str, dict[tuple, Group]] = {}
    for line in latest(records):
        found.setdefault(line.device, {}).setdefault((*line.key[:2], line.num_threads), {})[line.impl] = line
    return {device: list(cases.values()) for device, cases in found.items()}


def by_case(records: Iterable[Record]) -> list[Group]:
    """The newest records of each case and number of threads, on the device measured last."""
    records = list(records)
    last = max(reversed(records), key=lambda line: line.utc, default=None)
    return by_device(records)[last.device] if last else []


@dataclass(frozen=True)
class Timing:
    """Wall-clock times of one implementation."""

    median_us: float
    p10_us: float
    p90_us: float
    n: int
    cpu_per_wall: float
    """CPU time of the process per wall-clock time inside the calls: the number of cores really in use."""


def summarize(times_us: list[float], cpu_us: float) -> Timing:
    """Median and spread of a list of times; `cpu_us` is the CPU time of all of them together."""
    p10, median, p90 = np.quantile(times_us, [0.1, 0.5, 0.9]).tolist()
    return Timing(
        median_us=round(median, 2),
        p10_us=round(p10, 2),
        p90_us=round(p90, 2),
        n=len(times_us),
        cpu_per_wall=round(cpu_us / sum(times_us), 2),
    )


@cache
def environment(device: str = "cpu") -> dict:
    """The fields that say where, with what and by which command a number was taken; `device` is cpu or cuda."""
    commit, dirty = _git_state()
    vllm = vllm_distribution()
    return (_gpu() if device == "cuda" else {"device": device_name()}) | {
        "torch": version("torch"),
        "vllm": vllm.version if vllm else None,
        "commit": commit,
        "dirty": dirty,
        "command": _command(),
    }


def _command() -> str:
    """What was typed, without the paths of this machine: `python -m PACKAGE`, `python FILE` or an installed command."""
    script = Path(sys.argv[0]).resolve()
    if script.suffix != ".py":
        return shlex.join([script.name, *sys.argv[1:]])
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    if script.name == "__main__.py":
        return shlex.join(["python", "-m", ".".join(name.parent.parts), *sys.argv[1:]])
    return shlex.join(["python", str(name), *sys.argv[1:]])


def utc_now() -> str:
    """The time as a record carries it, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _gpu() -> dict:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    return {"device": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}


@cache
def device_name() -> str:
    """Model, core count and the instruction sets that matter here."""
    info = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    model = info.get("model name", platform.machine())
    flags = [flag for flag in ISA_FLAGS if flag in info.get("flags", "").split()]
    return f"{model}, {os.cpu_count()} cores, {' '.join(flags)}"


def _git_state() -> tuple[str, bool]:
    """(commit, whether files differ from it). Outside of a checkout, as in a copy that was sent to a machine with a
    GPU, the commit that INT8KV_COMMIT says it is an exact copy of, or ("unknown", True)."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if not IS_CHECKOUT:  # the working directory may be somebody else's checkout
            raise FileNotFoundError
        changes = git("status", "--porcelain", "--", ".", *(f":(exclude){path}" for path in GENERATED))
        return git("rev-parse", "--short=12", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get(COMMIT_VARIABLE)
        return (commit, False) if commit else ("unknown", True)

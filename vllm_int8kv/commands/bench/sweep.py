"""The per-request rows of a sweep: `results/requests/<config>-<start>.jsonl.gz`, one gzip member per run.

A run is one case with one kv_cache_dtype in one round: a header line, then one line per request. It is written
when it has ended, so a file that breaks off holds whole runs and a sweep goes on after the last of them.
"""

import gzip
import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from vllm_int8kv.commands.bench.config import BenchConfig, Case
from vllm_int8kv.commands.bench.replica import Row
from vllm_int8kv.evaluation.record import utc_now

FOLDER = "requests"
"""Below the folder of the records."""


@dataclass(frozen=True)
class Origin:
    """What all runs of a sweep share; a sweep goes on only where this has not changed."""

    config: str
    """name of the file without its ending"""
    config_sha256: str
    """of its meaning: comments do not count"""
    device: str
    commit: str
    dirty: bool


@dataclass
class Run:
    """One run: its header and its rows."""

    impl: str
    """the cache, as `kv_cache_dtypes` names it"""
    round: int
    case: dict
    duration_s: float
    """at the client, from the first request sent to the last answer"""
    replicas: list[dict]
    """`Replica.describe()` of each"""
    peak_running_seqs: int
    """most sequences of one replica that one step has advanced; online: most requests in flight"""
    lost: list[str] = field(default_factory=list)
    """replicas that died, and of what"""
    resubmitted: int = 0
    """requests sent a second time because their replica was lost"""
    server: dict | None = None
    """online: what vLLM's serving benchmark computed"""
    utc: str = field(default_factory=utc_now)
    rows: list[Row] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.impl, self.round, json.dumps(self.case, sort_keys=True))

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if row.error is not None]

    @property
    def is_clean(self) -> bool:
        """Whether it may become a number: nothing failed and no replica was lost."""
        return not self.failed and not self.lost

    @property
    def output_tok_per_s(self) -> float:
        return sum(row.output_tokens for row in self.rows if row.error is None) / self.duration_s


class Sweep:
    """The file of one sweep. A later run with the same key replaces an earlier one."""

    def __init__(self, path: Path, origin: Origin, runs: list[Run]) -> None:
        self.path, self.origin = path, origin
        self.runs = {run.key: run for run in runs}

    def is_done(self, impl: str, round_: int, case: Case) -> bool:
        """Whether this run has ended without a loss."""
        run = self.runs.get(Run(impl, round_, asdict(case), 0.0, [], 0).key)
        return run is not None and run.is_clean

    def append(self, run: Run) -> None:
        """Write a run, whole or not at all: a member that breaks off is dropped when the file is read."""
        header = asdict(self.origin) | {name: value for name, value in asdict(run).items() if name != "rows"}
        lines = [header | {"num_rows": len(run.rows)}, *(asdict(row) for row in run.rows)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(gzip.compress(text.encode(), mtime=0))
        self.runs[run.key] = run


def read(path: Path) -> Sweep:
    """Read a sweep and cut off what a crash has left half-written.

    Raises:
        ValueError: the file holds no run.
    """
    data, good, texts = path.read_bytes(), 0, []
    while good < len(data):
        member = zlib.decompressobj(wbits=31)  # 31: a gzip header
        try:
            text = member.decompress(data[good:])
        except zlib.error:
            break
        if not member.eof:
            break
        texts.append(text.decode())
        good = len(data) - len(member.unused_data)
    if not texts:
        raise ValueError(f"{path.name} holds no complete run")
    if good < len(data):
        path.write_bytes(data[:good])
    runs = [_parse(text) for text in texts]
    return Sweep(path, runs[-1][0], [run for _, run in runs])


def _parse(text: str) -> tuple[Origin, Run]:
    header, *rows = [json.loads(line) for line in text.splitlines()]
    if header.pop("num_rows") != len(rows):
        raise ValueError(f"a run of {header['impl']} has {len(rows)} rows, not as many as its header says")
    origin = Origin(**{name: header.pop(name) for name in Origin.__dataclass_fields__})
    return origin, Run(**header, rows=[Row(**row) for row in rows])


def sha256(config: BenchConfig) -> str:
    """Identifies what a configuration means."""
    return hashlib.sha256(TypeAdapter(BenchConfig).dump_json(config)).hexdigest()


def open_sweep(results: Path, origin: Origin, num_runs: int, fresh: bool) -> Sweep:
    """The sweep to continue: the newest of this configuration if unfinished and of the same origin, else a new one.

    Args:
        num_runs: how many runs make it complete.
        fresh: start a new one in any case.
    """
    folder = results / FOLDER
    for path in sorted(folder.glob(f"{origin.config}-????-??-??T*.jsonl.gz"), reverse=True)[:1]:
        try:
            sweep = read(path)
        except ValueError:
            path.unlink()  # it broke off in its first run
            break
        clean = sum(run.is_clean for run in sweep.runs.values())
        if not fresh and sweep.origin == origin and clean < num_runs:
            return sweep
    return Sweep(folder / f"{origin.config}-{utc_now()[:19].replace(':', '')}.jsonl.gz", origin, [])

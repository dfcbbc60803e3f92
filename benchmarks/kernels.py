"""Latency and bandwidth of the operators on CPU, against vLLM's own `CPU_ATTN` with a bf16 and an fp8 cache.

    python benchmarks/kernels.py                     every shape with one thread and with all cores
    python benchmarks/kernels.py --quick             one minute, for a first look
    python benchmarks/kernels.py --only prefill --threads 2

A case is one layer's work in one step: the batch's tokens are written, every implementation is checked against
exact attention over the values as its format stores them, and only then timed. Four sequences of a batch are
checked, the first and the last among them. Operands rotate over as many copies of the layer's cache as it takes
to find each of them cold, as a model's layers do. Blocks are scattered. 8 KV heads, except 3 at 3 queries per
KV head (SmolLM2); the largest case holds 2.1 GB of bf16 keys and values.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if not __package__:  # run as a script: this folder has a `kernels`, which transformers would take for its own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
from benchmarks import peers, record, timing
from benchmarks.layers import CheckError, Layers
from benchmarks.peers import Peer, Shape
from benchmarks.timing import Budget, ReadBandwidth, ReadMeter, Timing


class What(StrEnum):
    decode = "decode"
    verify = "verify"
    write = "write"
    prefill = "prefill"
    isa = "isa"
    """decode, with the kernels for older CPUs too"""


@dataclass(frozen=True)
class Case:
    """A measurement: attention over a batch or, for `write`, the cache update of its last `query_len` tokens."""

    what: What
    shape: Shape


DEFAULT_OUT = "benchmarks/results, with --quick none"

ATTEMPTS = 3
"""How often a case is timed anew because something else was using the cores."""

GQA_4 = Shape(num_seqs=1, seq_len=4096, query_len=1, num_heads=32, num_kv_heads=8, head_size=128)
SMOLLM2 = replace(GQA_4, num_heads=9, num_kv_heads=3, head_size=64)


def every_case() -> Iterator[Case]:
    """The shapes of the published tables, losses included."""
    for num_queries_per_kv in (1, 3, 4, 8):
        num_kv_heads = 3 if num_queries_per_kv == 3 else 8
        for head_size in (64, 128):
            for seq_len in (512, 4096, 16384):
                for num_seqs in (1, 8, 32):
                    num_heads = num_kv_heads * num_queries_per_kv
                    yield Case(What.decode, Shape(num_seqs, seq_len, 1, num_heads, num_kv_heads, head_size))
    for num_seqs in (1, 8):
        yield Case(What.isa, replace(GQA_4, num_seqs=num_seqs))
    for model in (GQA_4, SMOLLM2):
        for num_seqs in (1, 8):
            yield Case(What.verify, replace(model, num_seqs=num_seqs, query_len=4))
        for num_seqs in (1, 8, 32):  # one token each, at the end of 100
            yield Case(What.write, replace(model, num_seqs=num_seqs, seq_len=100))
        for num_tokens in (512, 4096):
            yield Case(What.write, replace(model, seq_len=num_tokens, query_len=num_tokens))
        for num_tokens in (512, 1024, 2048, 4096):
            yield Case(What.prefill, replace(model, seq_len=num_tokens, query_len=num_tokens))


def quick_cases() -> Iterator[Case]:
    """One of each kind."""
    yield Case(What.decode, replace(GQA_4, num_seqs=8))
    yield Case(What.decode, replace(SMOLLM2, seq_len=512))
    yield Case(What.verify, replace(SMOLLM2, query_len=4))
    yield Case(What.write, replace(GQA_4, num_seqs=8, seq_len=100))
    yield Case(What.prefill, replace(SMOLLM2, seq_len=512, query_len=512))


def bytes_moved(case: Case, peer: Peer) -> int | None:
    """Bytes a perfect implementation of the format moves; None for prefill, which arithmetic bounds."""
    shape = case.shape
    slot = shape.num_kv_heads * peer.slot_bytes(shape.head_size)
    if case.what == What.prefill:
        return None
    if case.what == What.write:
        fresh = 2 * shape.num_kv_heads * shape.head_size * peers.QUERY_DTYPE.itemsize
        return shape.num_tokens * (fresh + slot)
    return shape.num_seqs * shape.seq_len * slot


def measure(case: Case, layers: Layers, meter: ReadMeter, budget: Budget, idle: bool) -> list[record.Record]:
    """Check and time every implementation with the current number of threads.

    Args:
        idle: insist on a machine that does nothing else.

    Raises:
        CheckError: one does not match its reference or does not run with that many cores; nothing is recorded.
    """
    errors = {peer.name: layers.check(peer) for peer in layers.peers}
    step = layers.write_call if case.what == What.write else layers.attend_call
    calls = {peer.name: step(peer) for peer in layers.peers}
    for _ in range(ATTEMPTS):
        before = meter.measure()  # also evicts what the checks left in the last-level cache
        timings = timing.interleave(calls, budget)
        read = max(before, meter.measure(), key=lambda bandwidth: bandwidth.gb_per_s)
        if not idle or read.timing.cpu_per_wall >= 0.9 * torch.get_num_threads():
            break
    else:
        raise CheckError(f"the machine is busy: a plain read got {read.timing.cpu_per_wall} cores")
    for name, taken in timings.items():
        # Nothing can use more cores than there are; what looks like it is the granularity of the CPU clock.
        if torch.get_num_threads() < os.cpu_count() and taken.cpu_per_wall > 1.1 * torch.get_num_threads() + 0.1:
            raise CheckError(f"{name} used {taken.cpu_per_wall} cores")
    return [to_record(case, peer, layers, timings[peer.name], read, errors[peer.name]) for peer in layers.peers]


def to_record(
    case: Case, peer: Peer, layers: Layers, taken: Timing, read: ReadBandwidth, rel_error: float
) -> record.Record:
    """The line for one implementation."""
    moved = bytes_moved(case, peer)
    gb_per_s = None if moved is None else moved / taken.median_us / 1e3
    return record.Record(
        what=case.what.value,
        case=asdict(case.shape) | {"dtype": "bfloat16", "seed": layers.seed, "num_copies": layers.num_copies},
        impl=peer.name,
        resolved_backend=peer.backend(case.shape),
        bytes_moved=moved,
        gb_per_s=None if gb_per_s is None else round(gb_per_s, 3),
        read_gb_per_s=read.gb_per_s,
        frac_of_peak=None if gb_per_s is None else round(gb_per_s / read.gb_per_s, 4),
        checked=True,
        rel_error=float(f"{rel_error:.2e}"),
        num_threads=torch.get_num_threads(),
        utc=record.utc_now(),
        **asdict(taken),
        **record.environment(),
    )


def read_record(read: ReadBandwidth) -> record.Record:
    """The line for the bandwidth itself."""
    nbytes = round(read.gb_per_s * read.timing.median_us * 1e3)
    return record.Record(
        what="read_bandwidth",
        case={"operation": "sequential read"},
        impl="torch",
        resolved_backend=read.method,
        bytes_moved=nbytes,
        gb_per_s=read.gb_per_s,
        read_gb_per_s=read.gb_per_s,
        frac_of_peak=1.0,
        checked=True,
        rel_error=None,
        num_threads=torch.get_num_threads(),
        utc=record.utc_now(),
        **asdict(read.timing),
        **record.environment(),
    )


def keep(line: record.Record, out: Path | None) -> None:
    """Append a record, unless this run keeps none."""
    if out is not None:
        record.append(line, out)


def summary(groups: list[list[record.Record]]) -> Table:
    """One row per case: our time, and how many times faster than the others."""
    columns = ("case", "heads", "threads", "us", "GB/s", "of read", "vs auto", "vs fp8")
    table = Table(*columns, title="int8_custom against vLLM's CPU_ATTN")
    for group in groups:
        ours, auto, fp8 = (next(r for r in group if r.impl == impl) for impl in ("int8_custom", "auto", "fp8"))
        sizes, faster = ours.case, auto.median_us / ours.median_us
        table.add_row(
            f"{ours.what} {sizes['num_seqs']} x {sizes['seq_len']}",
            f"{sizes['num_heads']}/{sizes['num_kv_heads']} x {sizes['head_size']}",
            str(ours.num_threads),
            f"{ours.median_us:.1f}",
            "-" if ours.gb_per_s is None else f"{ours.gb_per_s:.1f}",
            "-" if ours.frac_of_peak is None else f"{ours.frac_of_peak:.0%}",
            f"[{'red' if faster < 1 else 'green'}]{faster:.2f}x",
            f"{fp8.median_us / ours.median_us:.2f}x",
        )
    return table


def main(
    threads: Annotated[str, typer.Option(help="thread counts, comma-separated; default: 1 and all cores")] = "",
    only: Annotated[list[What] | None, typer.Option(help="measure only this; may be repeated")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="few shapes, short timing, busy machines allowed")] = False,
    seed: Annotated[int, typer.Option(help="of keys, values and queries")] = 0,
    out: Annotated[Path | None, typer.Option(help=f"folder of the records; default: {DEFAULT_OUT}")] = None,
) -> None:
    """Check and time the operators; one JSON line per case and implementation."""
    counts = [int(count) for count in threads.split(",")] if threads else sorted({1, os.cpu_count() or 1})
    cases = [case for case in (quick_cases if quick else every_case)() if not only or case.what in only]
    budget = Budget(seconds=0.2, min_samples=3) if quick else Budget()
    if out is None and not quick:
        out = record.RESULTS
    console, failures, groups = Console(), [], []
    meter = ReadMeter()
    for count in counts:
        torch.set_num_threads(count)
        keep(read_record(meter.measure(samples=9)), out)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A bar that refreshes by itself has a thread that would be timed with the calls.
    with torch.inference_mode(), Progress(*bars, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases) * len(counts))
        for case in cases:
            progress.update(task, description=f"{case.what} {case.shape.num_seqs} x {case.shape.seq_len}", refresh=True)
            torch.set_num_threads(os.cpu_count() or 1)
            layers = Layers(case.shape, peers.load(every_isa=case.what == What.isa), seed)
            for count in counts:
                torch.set_num_threads(count)
                try:
                    groups.append(measure(case, layers, meter, budget, idle=not quick))
                    for line in groups[-1]:
                        keep(line, out)
                except CheckError as error:
                    failures.append(f"{case.what} {case.shape}, {count} threads: {error}")
                progress.advance(task)
    console.print(summary(groups))
    slower = sum(group[0].median_us > group[1].median_us for group in groups)
    console.print(f"{len(groups)} cases measured, {slower} slower than auto, {len(failures)} failed; records: {out}")
    for failure in failures:
        console.print(f"[red]{failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)

"""Latency and bandwidth of the operators: on CPU against vLLM's own `CPU_ATTN` with a bf16 and an fp8 cache, on a GPU
against what `cuda_peers.py` finds installed.

    python -m benchmarks.operators                     every shape with one thread and with all cores
    python -m benchmarks.operators --quick             one minute, for a first look
    python -m benchmarks.operators --only prefill --threads 2
    python -m benchmarks.operators --device cuda       shapes of larger models; needs PyTorch only

A case is one layer's work in one step: the batch's tokens are written, every implementation is checked against
exact attention over the values as its format stores them, and only then timed. Four sequences of a batch are
checked, the first and the last among them. Operands rotate over as many copies of the layer's cache as it takes
to find each of them cold, as a model's layers do. Blocks are scattered. On CPU 8 KV heads, except 3 at 3 queries per
KV head (SmolLM2); the largest case holds 2.1 GB of bf16 keys and values. Models are in bf16; `fp32` has a few shapes
in fp32, which CPUs without AVX-512 should serve.
"""

import os
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
from benchmarks import timing
from benchmarks.operators import cuda_peers
from benchmarks.operators.cases import Case, What, batch_text, bytes_moved, choose_cases
from benchmarks.operators.layers import CheckError, Layers
from benchmarks.operators.peers import Peer, name_missing
from benchmarks.timing import Budget, CallOnce, ReadBandwidth, ReadMeter, Timing
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import Device

DEFAULT_OUT = "benchmarks/results, with --quick none"

MIN_GPU_CALLS = 8
"""Timed together, so that starting them, several microseconds, is a small part of the time."""
ATTEMPTS = 3
"""How often a case is timed anew because something else was using the cores."""


def measure(
    case: Case, layers: Layers, meter: ReadMeter, budget: Budget, idle: bool, left_out: Counter[str]
) -> list[record.Record]:
    """Check and time every implementation with the current number of threads.

    Args:
        idle: insist on a CPU that does nothing else.
        left_out: counts why others were left out, see `check`.

    Raises:
        CheckError: one does not match its reference or does not run with that many cores; nothing is recorded.
    """
    errors = check(layers, left_out)
    writes = case.what.writes
    peers = [peer for peer in layers.peers if peer.name in errors and (peer.has_write_kernel or not writes)]
    step = layers.write_call if writes else layers.attend_call
    calls = {peer.name: step(peer) for peer in peers}
    repeats = 1
    if layers.device == Device.cuda:
        repeats = MIN_GPU_CALLS
        if case.what == What.prefill:  # vLLM queues it layer by layer
            calls = {name: timing.repeated(call, repeats) for name, call in calls.items()}
        else:
            repeats = max(layers.num_copies, repeats)
            calls = graphs(calls, repeats, left_out)
            peers = [peer for peer in peers if peer.name in calls]
    for _ in range(ATTEMPTS):
        before = meter.measure()  # also evicts what the checks left in the last-level cache
        timings = timing.interleave(calls, budget, meter.clock, repeats)
        read = max(before, meter.measure(), key=lambda bandwidth: bandwidth.gb_per_s)
        if not idle or read.timing.cpu_per_wall >= 0.9 * torch.get_num_threads():
            break
    else:
        raise CheckError(f"the machine is busy: a plain read got {read.timing.cpu_per_wall} cores")
    for name, taken in timings.items():
        # Nothing can use more cores than there are; what looks like it is the granularity of the CPU clock.
        if torch.get_num_threads() < os.cpu_count() and taken.cpu_per_wall > 1.1 * torch.get_num_threads() + 0.1:
            raise CheckError(f"{name} used {taken.cpu_per_wall} cores")
    return [to_record(case, peer, layers, timings[peer.name], read, errors[peer.name]) for peer in peers]


def check(layers: Layers, left_out: Counter[str]) -> dict[str, float]:
    """The relative error of every implementation.

    Another one than ours that does not match its reference, or does not suit the machine or the shape, is left out,
    and `left_out` counts why: vLLM 0.32's fp8 cache is off by 2 to 13 % on CPUs with AMX, for example.
    """
    errors = {}
    for peer in layers.peers:
        try:
            errors[peer.name] = layers.check(peer)
        except Exception as error:  # whatever a foreign kernel raises, the rest is measured
            if peer is layers.peers[0]:
                raise
            left_out[f"{peer.name}: {repr(error)[:200]}"] += 1
    return errors


def graphs(calls: dict[str, CallOnce], repeats: int, left_out: Counter[str]) -> dict[str, CallOnce]:
    """Each call `repeats` times in a CUDA graph; what cannot be captured is left out, unless it is ours."""
    captured = {}
    for name, call in calls.items():
        try:
            captured[name] = timing.GpuGraph(call, repeats)
        except Exception as error:  # whatever a foreign kernel raises, the rest is measured
            if name.startswith("int8_custom"):
                raise
            left_out[f"{name} in a CUDA graph: {repr(error)[:200]}"] += 1
    return captured


def to_record(
    case: Case, peer: Peer, layers: Layers, taken: Timing, read: ReadBandwidth, rel_error: float
) -> record.Record:
    """The line for one implementation."""
    moved = bytes_moved(case, peer)
    gb_per_s = None if moved is None else moved / taken.median_us / 1e3
    return record.Record(
        what=case.what.value,
        case=asdict(case.shape) | {"seed": layers.seed, "num_copies": layers.num_copies},
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
        **record.environment(layers.device),
    )


def read_record(read: ReadBandwidth, device: str) -> record.Record:
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
        **record.environment(device),
    )


def keep(line: record.Record, out: Path | None) -> None:
    """Append a record, unless this run keeps none."""
    if out is not None:
        record.append(line, out)


def is_slower(group: list[record.Record]) -> bool:
    """Whether an implementation that is not ours is faster."""
    return any(line.median_us < group[0].median_us for line in group if not line.impl.startswith("int8_custom"))


def summary(groups: list[list[record.Record]]) -> Table:
    """One row per case: our time, and how many times faster it is than the others."""
    others = list(dict.fromkeys(line.impl for group in groups for line in group if line.impl != "int8_custom"))
    columns = ("case", "heads", "threads", "us", "GB/s", "of read", *(f"vs {name}" for name in others))
    table = Table(*columns, title="int8_custom against the others")
    for group in groups:
        lines = {line.impl: line for line in group}
        ours = lines["int8_custom"]
        sizes = ours.case
        ratios = {name: lines[name].median_us / ours.median_us for name in others if name in lines}
        cells = (
            f"[{'red' if ratios[name] < 1 else 'green'}]{ratios[name]:.2f}x" if name in ratios else "-"
            for name in others
        )
        table.add_row(
            f"{ours.what} {batch_text(sizes)}",
            f"{sizes['num_heads']}/{sizes['num_kv_heads']} x {sizes['head_size']}",
            str(ours.num_threads),
            f"{ours.median_us:.1f}",
            "-" if ours.gb_per_s is None else f"{ours.gb_per_s:.1f}",
            "-" if ours.frac_of_peak is None else f"{ours.frac_of_peak:.0%}",
            *cells,
        )
    return table


def missing_peers(device: Device) -> dict[str, str]:
    """What cannot be compared with here, and why."""
    if device == Device.cuda:
        return cuda_peers.missing()
    from benchmarks.operators import cpu_peers  # needs vLLM

    return cpu_peers.missing()


def load_peers(case: Case, device: Device, chosen: tuple[str, ...] = ()) -> list[Peer]:
    """The implementations for a case, ours first; of the others those whose names begin with a chosen one, or all."""
    if device == Device.cuda:
        ours, *others = cuda_peers.load()
    else:
        from benchmarks.operators import cpu_peers  # needs vLLM

        by_format = case.what in (What.formats, What.write_formats)
        every = {"every_isa": case.what == What.isa, "every_format": by_format}
        ours, *others = cpu_peers.load(case.shape.torch_dtype, **every)
    return [ours, *(peer for peer in others if not chosen or peer.name.startswith(chosen))]


def main(
    device: Annotated[Device, typer.Option(help="where to run")] = Device.cpu,
    threads: Annotated[str, typer.Option(help="thread counts, comma-separated; default: 1 and all cores")] = "",
    only: Annotated[list[What] | None, typer.Option(help="measure only this; may be repeated")] = None,
    first_model: Annotated[bool, typer.Option("--first-model", help="on a GPU the shapes of one model")] = False,
    block_size: Annotated[int | None, typer.Option(help="only shapes with blocks of so many slots")] = None,
    peers: Annotated[str, typer.Option(help="what to compare with, by how names begin, comma-separated")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="few shapes, short timing, busy machines allowed")] = False,
    seed: Annotated[int, typer.Option(help="of keys, values and queries")] = 0,
    out: Annotated[Path | None, typer.Option(help=f"folder of the records; default: {DEFAULT_OUT}")] = None,
) -> None:
    """Check and time the operators; one JSON line per case and implementation."""
    if device == Device.cuda:
        timing.require_gpu()
        threads = "1"  # nothing of what is timed runs on the CPU
    name_missing(missing_peers(device))
    chosen = tuple(peers.split(",")) if peers else ()
    counts = [int(count) for count in threads.split(",")] if threads else sorted({1, os.cpu_count() or 1})
    cases = [case for case in choose_cases(device, quick, first_model) if not only or case.what in only]
    cases = [case for case in cases if block_size in (None, case.shape.block_size)]
    budget = Budget(seconds=0.2, min_samples=3) if quick else Budget(seconds=0.3 if device == Device.cuda else 2.0)
    if out is None and not quick:
        out = record.RESULTS
    console, failures, groups, left_out = Console(), [], [], Counter()
    meter, is_idle = ReadMeter(device), not quick and device == Device.cpu
    for count in counts:
        torch.set_num_threads(count)
        keep(read_record(meter.measure(samples=9), device), out)
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A bar that refreshes by itself has a thread that would be timed with the calls.
    with torch.inference_mode(), Progress(*bars, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cases) * len(counts))
        for case in cases:
            progress.update(task, description=f"{case.what} {batch_text(asdict(case.shape))}", refresh=True)
            torch.set_num_threads(os.cpu_count() or 1)
            layers = Layers(case.shape, load_peers(case, device, chosen), seed, device)
            for count in counts:
                torch.set_num_threads(count)
                try:
                    groups.append(measure(case, layers, meter, budget, is_idle, left_out))
                    for line in groups[-1]:
                        keep(line, out)
                except CheckError as error:
                    failures.append(f"{case.what} {case.shape}, {count} threads: {error}")
                progress.advance(task)
    console.print(summary(groups))
    slower = sum(map(is_slower, groups))
    console.print(
        f"{len(groups)} cases measured, {slower} slower than the fastest other, {len(failures)} failed; records: {out}"
    )
    for why, count in left_out.items():
        console.print(f"left out of {count} cases: {why}", markup=False)
    for failure in failures:
        console.print(f"[red]{failure}")
    sys.exit(1 if failures else 0)

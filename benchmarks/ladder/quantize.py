"""The quantization ladder of arXiv 2601.04719: its ten shapes, every variant, on CPU or GPU.

    python -m benchmarks.ladder                      shapes up to 131072 x 1024 on CPU (on a GPU all), and the errors
    python -m benchmarks.ladder --all                all ten; the largest takes 11 GB of memory
    python -m benchmarks.ladder --shape 131072x2048
    python -m benchmarks.ladder --device cuda
    python -m benchmarks.ladder --errors model       keys and values of SmolLM2 through vLLM

Every variant is compared with the reference bit for bit before it is timed. Timed are: quantization with given
scales, as the paper times it; with the scales found inside the timed region; and dequantization. Operands are cold
and their pages are mapped; the paper's CPU loop ran once on fresh pages, which made it slower. Rates count the bytes
that must move: every element, code and scale once.
"""

import os
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import timing
from benchmarks.ladder import quantize_errors
from benchmarks.ladder.operands import COPY, SHAPES, CheckError, Key, LadderShape, Operands, bytes_moved, measure
from benchmarks.timing import Budget, Timing
from vllm_int8kv.cache import library
from vllm_int8kv.cache.ladder import CPU_VARIANTS, CUDA_VARIANTS
from vllm_int8kv.evaluation import record

DEFAULT_ELEMENTS = 1 << 27
"""Shapes with more elements are measured on CPU with --all only: the paper's loop takes minutes for them."""


class Errors(StrEnum):
    none = "none"
    uniform = "uniform"
    model = "model"
    all = "all"


class DType(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def parse_shape(text: str) -> LadderShape:
    tokens, x, channels = text.partition("x")
    if not (x and tokens.isdigit() and channels.isdigit() and int(tokens) * int(channels)):
        raise typer.BadParameter(f"a shape is TOKENSxCHANNELS, for instance 131072x1024, got {text!r}")
    return LadderShape(int(tokens), int(channels))


def backend(device: str, variant: str) -> str:
    return f"torch {device}" if variant == COPY else f"int8kv {library.cpu_isa() if device == 'cpu' else device}"


def to_records(operands: Operands, timings: dict[Key, Timing], earlier: dict[Key, Timing]) -> list[record.Record]:
    """The lines of one shape and thread count.

    Args:
        earlier: with one thread in the same run; has the two CPU loops that speed-ups refer to.
    """
    shape, device = operands.shape, operands.device
    copied = 2 * shape.num_elements * operands.dtype.itemsize
    copy_gb_per_s = copied / timings[COPY, COPY].median_us / 1e3
    lines = []
    for (variant, operation), taken in timings.items():
        moved = copied if variant == COPY else bytes_moved(shape, operands.dtype)
        rate = moved / taken.median_us / 1e3
        metrics = {"copy_gb_per_s": round(copy_gb_per_s, 3), "frac_of_copy": round(rate / copy_gb_per_s, 4)}
        for loop in ("column_strided", "row_major"):
            if base := (timings | earlier).get((loop, operation)):
                metrics[f"vs_{loop}"] = round(base.median_us / taken.median_us, 3)
        lines.append(
            record.Record(
                what="quantize",
                case=asdict(shape)
                | {"operation": operation, "device": device, "dtype": str(operands.dtype).removeprefix("torch.")}
                | {"data": "uniform(-1, 1)", "seed": operands.seed, "num_copies": len(operands.x)},
                impl=variant,
                resolved_backend=backend(device, variant),
                bytes_moved=moved,
                gb_per_s=round(rate, 3),
                read_gb_per_s=None,
                frac_of_peak=None,
                metrics=metrics,
                checked=True,
                rel_error=None,
                num_threads=torch.get_num_threads(),
                utc=record.utc_now(),
                **asdict(taken),
                **record.environment(device),
            )
        )
    return lines


def measure_shape(
    shape: LadderShape, device: str, dtype: torch.dtype, seed: int, budget: Budget, idle: bool
) -> list[record.Record]:
    """Check and time every variant: on CPU the rungs for one thread, then the one for all cores.

    Args:
        idle: insist on a machine that does nothing else.

    Raises:
        CheckError: one does not match the reference, or the machine is busy; nothing of the shape is recorded.
        MemoryError: the shape does not fit into the memory that is free.
    """
    cores = os.cpu_count() or 1
    torch.set_num_threads(cores)
    operands = Operands(shape, dtype, device, seed)
    if device == "cuda":
        operands.check(list(CUDA_VARIANTS))
        timings = measure(operands, list(CUDA_VARIANTS), budget, timing.gpu_clock)
        return to_records(operands, timings, {})
    operands.check(list(CPU_VARIANTS))
    torch.set_num_threads(1)
    single = measure(operands, [v for v in CPU_VARIANTS if v != "vectorized"], budget, timing.wall_clock)
    require_idle(single, shape, idle)
    lines = to_records(operands, single, {})
    if cores > 1:
        torch.set_num_threads(cores)
        threaded = measure(operands, ["vectorized"], budget, timing.wall_clock)
        require_idle(threaded, shape, idle)
        lines += to_records(operands, threaded, single)
    return lines


def require_idle(timings: dict[Key, Timing], shape: LadderShape, idle: bool) -> None:
    """Raise CheckError if the copy did not get its cores; PyTorch copies a small matrix on one, whatever is set."""
    got = timings[COPY, COPY].cpu_per_wall
    is_small = torch.get_num_threads() > 1 and shape.num_elements < 1 << 20
    if idle and not is_small and got < 0.9 * torch.get_num_threads():
        raise CheckError(f"{shape}: the machine is busy: a copy with {torch.get_num_threads()} threads got {got} cores")


def summary(lines: list[record.Record]) -> Table:
    """One row per variant and shape."""
    head = ("shape", "variant", "threads", "operation", "ms", "GB/s", "of copy", "vs paper", "vs plain")
    table = Table(*head, title="Quantization ladder")
    for line in lines:
        metrics = line.metrics or {}
        table.add_row(
            f"{line.case['num_tokens']} x {line.case['num_channels']}",
            line.impl,
            str(line.num_threads),
            line.case["operation"].replace("quantize_with_", "+ "),
            f"{line.median_us / 1e3:.3f}",
            f"{line.gb_per_s:.1f}",
            f"{metrics['frac_of_copy']:.0%}",
            *(f"{metrics[name]:.1f}x" if name in metrics else "-" for name in ("vs_column_strided", "vs_row_major")),
        )
    return table


def main(
    device: Annotated[record.Device, typer.Option(help="where the kernels run")] = record.Device.cpu,
    every: Annotated[bool, typer.Option("--all", help="all ten shapes on CPU, too")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="TOKENSxCHANNELS; may be repeated")] = None,
    errors: Annotated[Errors, typer.Option(help="which errors to measure; default: all, with --shape none")] = None,
    dtype: Annotated[DType, typer.Option(help="of the matrix")] = DType.float32,
    seconds: Annotated[float, typer.Option(help="per shape and thread count")] = 3.0,
    seed: Annotated[int, typer.Option(help="of the matrix")] = 0,
    busy: Annotated[bool, typer.Option("--busy", help="record even if other programs use the cores")] = False,
    out: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Check and time the ladder; one JSON line per shape, variant and operation."""
    if device == "cuda":
        timing.require_gpu()
    shapes = [parse_shape(text) for text in shape or ()]
    if not shape:
        shapes = [s for s in SHAPES if every or device == "cuda" or s.num_elements <= DEFAULT_ELEMENTS]
    errors = errors or (Errors.none if shape else Errors.all)
    budget = Budget(seconds=seconds, min_samples=5, max_samples=50)
    console, lines, failures = Console(), [], []
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # A bar that refreshes by itself has a thread that would be timed with the calls.
    with torch.inference_mode(), Progress(*bars, console=console, auto_refresh=False) as progress:
        timed = [] if errors == Errors.model and not shape else shapes
        uniform = shapes if errors in (Errors.uniform, Errors.all) else []
        task = progress.add_task("", total=len(timed) + len(uniform) + (errors in (Errors.model, Errors.all)))
        for kind, todo in (("time", timed), ("errors", uniform)):
            for one in todo:
                progress.update(task, description=f"{kind} {one}", refresh=True)
                try:
                    if kind == "time":
                        found = measure_shape(one, device.value, getattr(torch, dtype), seed, budget, not busy)
                        lines += found
                    else:
                        found = quantize_errors.uniform(one, device.value, seed, record.environment(device.value))
                    for line in found:
                        record.append(line, out)
                except (CheckError, MemoryError) as error:
                    failures.append(str(error))
                progress.advance(task)
        if errors in (Errors.model, Errors.all):
            progress.update(task, description="errors of SmolLM2", refresh=True)
            for line in quantize_errors.smollm2(device.value, record.environment(device.value)):
                record.append(line, out)
            progress.advance(task)
    console.print(summary(lines))
    console.print(f"{len(lines)} timings, {len(failures)} shapes failed; records: {out}")
    for failure in failures:
        console.print(f"[red]{failure}")
    sys.exit(1 if failures else 0)

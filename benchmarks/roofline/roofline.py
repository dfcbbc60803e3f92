"""Decoding from X in place of K and V (XQuant): the context length up to which that is free, and what it costs.

    python -m benchmarks.roofline                 computed for GPUs and this CPU, measured for a layer on this CPU
    python -m benchmarks.roofline --quick         small shapes and short timing, records nothing

`cost.py` has the formula. This CPU's peaks are measured: streaming reads as for the operators, and the fastest of a few
matrix products. Then a layer's attention in a decode step of one sequence is timed, from INT8 X (`in_place.py`) and
from INT8 K and V by this project's operator, each from cold copies and checked first. Measured, rematerialization
counts as free while what it takes longer than attention over K and V is no longer than reading the layer's weights.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.operators.layers import CheckError, Layers
from benchmarks.operators.peers import Int8Custom, Shape
from benchmarks.roofline.cost import (
    MACHINES,
    MODELS,
    X_BITS,
    Cost,
    Machine,
    Model,
    attention_slowdown,
    free_length,
    from_latents,
    from_x,
    slowdown,
)
from benchmarks.roofline.in_place import InPlaceLayer
from benchmarks.timing import Budget, ReadBandwidth, ReadMeter, Timing, interleave
from vllm_int8kv.evaluation import record

WHAT = "remat"
MATMUL, FROM_X, FROM_KV = "matmul", "X, 8 bits", "int8_custom"
BATCHES = (1, 8, 32)
LENGTH = 4096
SEQ_LENS = (64, 256, 1024, 4096)
MATMUL_SIZES = (1024, 2048, 4096)
ATTEMPTS = 3
MIN_CORES = 0.9
"""Share of the threads' cores that a plain read must get; with less, something else is using them."""


def costs(model: Model) -> Iterator[Cost]:
    """What a token may be stored as: X, and the latents where they are narrower."""
    for bits in X_BITS:
        yield from_x(model, bits)
        if model.kv_width < model.hidden_size:
            yield from_latents(model, bits)


def computed(machine: Machine) -> Table:
    """Free lengths by batch, and how much longer a layer's step takes at a context of 4,096."""
    heads = [f"{batch} seqs" for batch in BATCHES]
    title = f"{machine.name}, P = {machine.ridge:.0f}: free up to so many tokens, then the slowdown at {LENGTH:,}"
    table = Table("layer of", "stored", *heads, *heads, "attention alone", title=title)
    for model in MODELS:
        for cost in costs(model):
            lengths = [f"{free_length(machine, model, cost, batch):,.0f}" for batch in BATCHES]
            slower = [f"{slowdown(machine, model, cost, LENGTH, batch):.2f}x" for batch in BATCHES]
            table.add_row(model.name, cost.name, *lengths, *slower, f"{attention_slowdown(machine, model, cost):.1f}x")
    return table


def matmul_timings(sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> dict[tuple[int, torch.dtype], Timing]:
    """Square products by size and dtype."""
    timings = {}
    for dtype in dtypes:
        for size in sizes:
            a, b = torch.randn(2, size, size).to(dtype)
            call = {"product": lambda turn, a=a, b=b: torch.mm(a, b)}
            timings[size, dtype] = interleave(call, Budget(seconds=1.0, min_samples=5))["product"]
    return timings


def flops_per_s(size: int, timing: Timing) -> float:
    """Of a square product."""
    return 2 * size**3 / timing.median_us * 1e6


def line(case: dict, impl: str, backend: str, timing: Timing, read: ReadBandwidth, **fields: object) -> record.Record:
    """A record of this benchmark."""
    empty = dict.fromkeys(("bytes_moved", "gb_per_s", "frac_of_peak", "rel_error"))
    return record.Record(
        what=WHAT,
        case=case,
        impl=impl,
        resolved_backend=backend,
        read_gb_per_s=read.gb_per_s,
        checked=True,
        num_threads=torch.get_num_threads(),
        utc=record.utc_now(),
        **(empty | fields),
        **asdict(timing),
        **record.environment(),
    )


def measure_layer(
    model: Model, seq_len: int, dtype: torch.dtype, seed: int, budget: Budget, meter: ReadMeter, idle: bool
) -> list[record.Record]:
    """Check and time a layer's attention from X and from K and V.

    Raises:
        CheckError: one differs from its reference, or something else is using the cores.
    """
    name = str(dtype).removeprefix("torch.")
    shape = Shape(1, seq_len, 1, model.num_heads, model.num_kv_heads, model.head_size, dtype=name)
    peer = Int8Custom()
    layers, in_place = Layers(shape, [peer], seed), InPlaceLayer(model, seq_len, dtype, seed)
    errors = {FROM_X: in_place.check(), FROM_KV: layers.check(peer)}
    calls = {FROM_X: in_place.call(), FROM_KV: layers.attend_call(peer)}
    for _ in range(ATTEMPTS):
        before = meter.measure()
        timings = interleave(calls, budget)
        read = max(before, meter.measure(), key=lambda bandwidth: bandwidth.gb_per_s)
        if not idle or read.timing.cpu_per_wall >= MIN_CORES * torch.get_num_threads():
            break
    else:
        raise CheckError(f"the machine is busy: a plain read got {read.timing.cpu_per_wall} cores")
    case = {"model": model.name, "seq_len": seq_len, "dtype": name, "seed": seed}
    backends = {FROM_X: f"torch.mm and SDPA in {name}", FROM_KV: peer.backend(shape)}
    return [
        line(case, impl, backends[impl], timings[impl], read, rel_error=float(f"{errors[impl]:.2e}")) for impl in calls
    ]


def this_cpu(lines: list[record.Record], read: ReadBandwidth) -> tuple[Machine, torch.dtype]:
    """The peaks of the matrix products measured, and the dtype that reaches them."""
    best = max(lines, key=lambda found: found.metrics["flops_per_s"])
    name = f"this CPU, {best.num_threads} threads"
    machine = Machine(name, best.metrics["flops_per_s"], read.gb_per_s * 1e9, "measured")
    return machine, getattr(torch, best.case["dtype"])


def main(
    threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="small shapes, short timing, no records")] = False,
    seed: Annotated[int, typer.Option(help="of X, keys, values and queries")] = 0,
    out: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Compute the lengths up to which decoding from X is free, and measure a layer of it on this CPU."""
    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    console = Console()
    for machine in MACHINES:
        console.print(computed(machine))
    torch.set_num_threads(threads or os.cpu_count() or 1)
    budget = Budget(seconds=0.2, min_samples=3) if quick else Budget(seconds=2.0, min_samples=7)
    models, seq_lens = (MODELS[-1:], SEQ_LENS[:2]) if quick else (MODELS, SEQ_LENS)
    meter, failures = ReadMeter(), []
    with torch.inference_mode():
        read = meter.measure(samples=9)
        timings = matmul_timings(MATMUL_SIZES[:1] if quick else MATMUL_SIZES, (torch.bfloat16, torch.float32))
        lines = [
            line(
                {"size": size, "dtype": str(dtype).removeprefix("torch.")},
                MATMUL,
                "torch.mm",
                timing,
                read,
                metrics={"flops_per_s": flops_per_s(size, timing)},
            )
            for (size, dtype), timing in timings.items()
        ]
        machine, dtype = this_cpu(lines, read)
        console.print(computed(machine))
        table = Table("layer of", "tokens", "from X, us", "from K and V, us", "ratio", title=machine.name)
        for model in models:
            for seq_len in seq_lens:
                try:
                    measured = measure_layer(model, seq_len, dtype, seed, budget, meter, idle=not quick)
                except CheckError as error:
                    failures.append(f"{model.name}, {seq_len} tokens: {error}")
                    continue
                lines += measured
                from_x_us, from_kv_us = (found.median_us for found in measured)
                cells = (f"{seq_len:,}", f"{from_x_us:,.0f}", f"{from_kv_us:,.0f}", f"{from_x_us / from_kv_us:.1f}x")
                table.add_row(model.name, *cells)
    console.print(table)
    if not quick:
        for found in lines:
            record.append(found, out)
    for failure in failures:
        console.print(failure, style="red", markup=False)
    sys.exit(1 if failures else 0)

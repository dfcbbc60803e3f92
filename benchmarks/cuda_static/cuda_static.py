"""Records of the CUDA kernels as they are compiled, or a comparison with them; needs nvcc's objects and no GPU.

    make cuda-records                                       compile the hot kernels, record them, rewrite the tables
    python -m benchmarks.cuda_static build/cuda --check     fail if objects there differ from the records

`kernels.py` says which kernels and figures there are. A figure that moves by more than 2 % fails the check, for better
or worse, until it is recorded: no change of the machine code goes unseen.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from benchmarks.cuda_static import sass, static_record
from benchmarks.cuda_static.kernels import HOT_KERNELS, HotKernel, figures, matching
from benchmarks.cuda_static.static_record import Figures, StaticRecord
from vllm_int8kv.evaluation import record

DISASSEMBLERS = 2
SHOWN = {
    "registers": "registers",
    "resident_blocks": "blocks",
    "loop_instructions": "loop",
    "before_copy_instructions": "before copies",
    "before_copy_divisions": "divisions",
    "merge_rounds_of_66": "rounds",
    "row_instructions": "per row",
    "k_store_ways": "ways of K",
    "v_store_ways": "of V",
}
"""Figures that are printed, with the heads of their columns."""


@dataclass(frozen=True)
class Found:
    """A hot kernel among the objects."""

    hot: HotKernel
    name: str
    resources: dict
    object_file: Path


def find(objects: Path, arch: str, problems: list[str]) -> list[Found]:
    """The hot kernels of an architecture; what is missing goes to `problems`."""
    compiled = {
        resources["name"]: (resources, path.with_suffix(".o"))
        for path in sorted(objects.glob(f"*.{arch}.json"))
        for resources in json.loads(path.read_text())
    }
    found = []
    for hot in HOT_KERNELS:
        try:
            name = matching(list(compiled), hot)
            found.append(Found(hot, name, *compiled[name]))
        except LookupError as error:
            problems.append(f"SM{arch}, {error}")
    return found


def analyse(objects: Path, arch: str, problems: list[str]) -> dict[str, tuple[Found, Figures]]:
    """The figures of every hot kernel of an architecture, by the kernel's name in the tables.

    Args:
        problems: gets a line for each kernel that is missing, or that has no path as `kernels.py` wants it.
    """
    found = find(objects, arch, problems)
    files = sorted({kernel.object_file for kernel in found})
    with ThreadPoolExecutor(DISASSEMBLERS) as pool:
        code = dict(zip(files, map(sass.parse, pool.map(sass.disassemble, files)), strict=True))
    results = {}
    for kernel in found:
        listed = code[kernel.object_file][kernel.resources["symbol"]]
        try:
            results[kernel.hot.name] = kernel, figures(kernel.hot, listed, kernel.resources, arch)
        except ValueError as error:
            problems.append(f"SM{arch}, {kernel.hot.name}: {error}; kernels.py says what is counted")
    return results


def nvcc_version() -> str:
    """As `13.0.88`."""
    printed = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", printed)[1]


def table(arch: str, results: dict[str, Figures]) -> Table:
    shown = Table(Column("kernel", no_wrap=True), *SHOWN.values(), title=f"SM{arch}")
    for name, found in results.items():
        shown.add_row(name, *(f"{found[figure]:g}" if figure in found else "" for figure in SHOWN))
    return shown


def main(
    objects: Annotated[Path, typer.Argument(help="folder that cuda_compile.py --keep left")],
    arch: Annotated[list[str] | None, typer.Option(help="may be repeated; default: all in the folder")] = None,
    check: Annotated[bool, typer.Option("--check", help="record nothing, fail on differences")] = False,
    results: Annotated[Path, typer.Option(help="folder of the records")] = static_record.RESULTS,
) -> None:
    """Record the hot CUDA kernels as they are compiled, or compare them with the records."""
    archs = arch or sorted({path.suffixes[-2][1:] for path in objects.glob("*.*.json")}, key=int)
    if not archs:
        sys.exit(f"{objects} has no objects: make cuda-records compiles them")
    nvcc, utc, known = nvcc_version(), record.utc_now(), static_record.read(results)
    console, problems, lines = Console(width=160), [], []
    for number in archs:
        found = analyse(objects, number, problems)
        kernels = {name: counted for name, (_, counted) in found.items()}
        problems += [f"SM{number}, {n}: {text}" for n, c in kernels.items() for text in static_record.forbidden(c)]
        if check:
            recorded = static_record.newest(known, number)
            problems += [f"SM{number}, {change}" for change in static_record.changes(recorded, kernels, nvcc)]
        else:
            console.print(table(number, kernels))
        lines += [(number, kernel, counted) for kernel, counted in found.values()]
    if problems:
        hint = "; what is meant to be so is recorded by `make cuda-records`" if check else "; nothing was recorded"
        sys.exit("\n".join([*problems, f"{len(problems)} problems{hint}"]))
    if check:
        print(f"{len(lines)} kernels of SM{', SM'.join(archs)} are as recorded")
    environment = {name: record.environment()[name] for name in ("commit", "dirty", "command")}
    for number, kernel, counted in [] if check else lines:
        line = StaticRecord(
            kernel=kernel.hot.name,
            function=kernel.name,
            arch=number,
            nvcc=nvcc,
            figures=counted,
            utc=utc,
            **environment,
        )
        record.append(line, results)

"""A first run on a GPU that is lent for minutes, on a machine that is bare and has no network.

    make gpu-kit                                 here: build and pack what travels, and print its sizes
    python -m benchmarks.gpu list                here: the calls, what each brings along, its steps and limits
    python -m benchmarks.gpu run kernels         there, one call after the other: `part --number 0`, ..., `ladder`
    make gpu-check                               all of them in order, where everything is installed already
    python -m benchmarks.gpu collect FOLDER      here: the records that came back, into benchmarks/results
    make gpu-dry-run                             here: every call on a CPU, with a stub for the GPU

Logs, records and `summary.jsonl` go to `--out`, by default `$OUT`. Records name the commit in INT8KV_COMMIT, else the
one that the kit was made of.
"""

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import bundle, calls, parts
from benchmarks.gpu.calls import ANSWERS, CALLS, KERNELS, KIT, PARTS, Machine
from benchmarks.gpu.idle import wait_until_idle
from benchmarks.gpu.parts import MANIFEST, DamagedError, Manifest
from benchmarks.gpu.steps import SUMMARY, Outcome, Status, run_call
from vllm_int8kv.evaluation import record

MAX_FILES = 8
MAX_FILE_BYTES = 16 << 20
"""What may come back of a call."""
MIB = 1 << 20

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0], no_args_is_help=True)
KitOption = Annotated[Path, typer.Option(help="folder of what travels")]
StoreOption = Annotated[Path, typer.Option(help="folder that keeps what has arrived")]
OutOption = Annotated[Path, typer.Option(envvar="OUT", help="folder of what comes back")]
DeviceOption = Annotated[str, typer.Option(help="cuda, or cpu to see that the calls run")]
STORE = Path(tempfile.gettempdir()) / "int8kv-gpu"
OUT = KIT / "out"


@app.command()
def prepare(
    kit: KitOption = KIT,
    packages: Annotated[bool, typer.Option(help="vLLM and what it needs, too")] = True,
) -> None:
    """Pack the wheel, the driver and the packages, and print all sizes."""
    try:
        files, cut = bundle.prepare(kit, with_packages=packages)
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
    for path in files:
        print(f"{path.stat().st_size / MIB:7.1f} MiB  {path.relative_to(kit)}")
    for part in cut:
        print(f"{part.num_bytes / MIB:7.1f} MiB  {PARTS}/{part.name}")
    print(f"{sum(part.num_bytes for part in cut) / MIB:7.1f} MiB in {len(cut)} parts")


def _brings_packages(kit: Path) -> bool:
    return (kit / MANIFEST).is_file() and bool(Manifest.load(kit).parts)


def schedule(kit: Path) -> list[tuple[str, int | None, list[str]]]:
    """Every call with the number of its part and what it brings along, relative to the kit."""
    manifest = Manifest.load(kit) if (kit / MANIFEST).is_file() else None
    found: list[tuple[str, int | None, list[str]]] = []
    for name in CALLS:
        if name != "part":
            found.append((name, None, [MANIFEST, KERNELS] if name == "kernels" else []))
            continue
        for number, part in enumerate(manifest.parts if manifest else ()):
            found.append((name, number, [MANIFEST, f"{PARTS}/{part.name}"]))
    return found


@app.command("list")
def list_calls(kit: KitOption = KIT) -> None:
    """The calls in order, with what travels along, their steps and limits."""
    table = Table("call", "what for", "brings", "MiB", "limit, s", "steps, s")
    total = 0.0
    for name, number, brings in schedule(kit):
        machine = Machine("cuda", kit, STORE, OUT)
        steps = CALLS[name].steps(machine, *([] if number is None else [number]))
        paths = [path for bring in brings for path in (kit / bring, *(kit / bring).glob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in paths)
        total += CALLS[name].seconds
        limits = ", ".join(f"{step.name} {step.seconds:.0f}" for step in steps)
        label = name if number is None else f"{name} --number {number}"
        table.add_row(
            label, CALLS[name].purpose, "\n".join(brings), f"{size / MIB:.1f}", f"{CALLS[name].seconds:.0f}", limits
        )
    console = Console(width=max(Console().width, 140))
    console.print(table)
    console.print(f"limits together {total:.0f} s")


@app.command()
def run(
    call: Annotated[str, typer.Argument(help=", ".join(CALLS))],
    number: Annotated[int | None, typer.Option(help="of the part")] = None,
    device: DeviceOption = "cuda",
    kit: KitOption = KIT,
    store: StoreOption = STORE,
    out: OutOption = OUT,
) -> None:
    """Run one call; exit with 1 if a step did not pass."""
    if call not in CALLS:
        raise typer.BadParameter(f"{call!r} is no call; there are {', '.join(CALLS)}")
    if (call == "part") != (number is not None):
        raise typer.BadParameter("the call `part`, and no other, takes --number")
    machine = _machine(device, kit, store, out)
    outcomes = _run(machine, call, number)
    _print_summary(outcomes, out)
    sys.exit(any(outcome.status != Status.passed for outcome in outcomes))


@app.command("all")
def run_all(
    device: DeviceOption = "cuda", kit: KitOption = KIT, store: StoreOption = STORE, out: OutOption = OUT
) -> None:
    """Run every call in order, each into a folder of its own; exit with 1 if a step did not pass."""
    outcomes = []
    for call, number, _ in schedule(kit):
        if CALLS[call].is_engine and find_spec("vllm") is None and not _brings_packages(kit):
            print(f"{call}: left out, as vLLM is not installed")
            continue
        folder = out / (call if number is None else f"{call}-{number}")
        outcomes += _run(_machine(device, kit, store, folder), call, number)
    _print_summary(outcomes, out)
    sys.exit(any(outcome.status != Status.passed for outcome in outcomes))


def _machine(device: str, kit: Path, store: Path, out: Path) -> Machine:
    if device not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device is cuda or cpu, got {device!r}")
    if shutil.which("nvidia-smi") is None:
        sys.exit("benchmarks.gpu needs an NVIDIA GPU: nvidia-smi was not found")
    return Machine(device, *(path.resolve() for path in (kit, store, out)))


def _run(machine: Machine, call: str, number: int | None) -> list[Outcome]:
    steps = CALLS[call].steps(machine, *([] if number is None else [number]))
    seconds = machine.limit(CALLS[call].seconds)
    name = call if number is None else f"{call}-{number}"
    return run_call(name, steps, machine.out, seconds, machine.environment(), wait_until_idle, machine.commit())


def _print_summary(outcomes: list[Outcome], out: Path) -> None:
    """Last, because a machine may show the end of the output only."""
    table = Table("call", "step", "", "s", "")
    for outcome in outcomes:
        table.add_row(outcome.call, outcome.step, outcome.status, f"{outcome.seconds:.1f}", outcome.detail)
    Console().print(table)
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    for folder in sorted({path.parent for path in files}):
        here = [path for path in files if path.parent == folder]
        if len(here) > MAX_FILES:
            print(f"{folder} has {len(here)} files, of which {MAX_FILES} may come back")
    for path in files:
        if path.stat().st_size > MAX_FILE_BYTES:
            print(f"{path} has {path.stat().st_size / MIB:.0f} MiB, of which {MAX_FILE_BYTES / MIB:.0f} may come back")


@app.command()
def receive(number: int, kit: KitOption = KIT, store: StoreOption = STORE) -> None:
    """Check a part that has arrived and decompress it into the store."""
    try:
        parts.receive(Manifest.load(kit).parts[number], kit / PARTS, store)
    except (IndexError, OSError, DamagedError) as error:
        sys.exit(f"part {number}: {error}")


@app.command()
def unpack(kit: KitOption = KIT, store: StoreOption = STORE) -> None:
    """Unpack all parts in the store, where packages are then found."""
    try:
        parts.join(Manifest.load(kit).parts, store, store / calls.SITE)
    except (OSError, DamagedError) as error:
        sys.exit(str(error))


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="what came back, in any folders below")],
    results: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Append the records that came back to those that are here; all of them, or none if one is damaged."""
    paths = [path for path in sorted(folder.rglob("*.jsonl")) if path.name not in (SUMMARY, ANSWERS)]
    try:
        lines = [record.parse(line) for path in paths for line in path.read_text().splitlines()]
    except ValueError as error:
        sys.exit(f"nothing was appended: {error}")
    for line in lines:
        record.append(line, results)
    print(f"{len(lines)} records of {len(paths)} files; commits: {', '.join(sorted({line.commit for line in lines}))}")


if __name__ == "__main__":
    app()

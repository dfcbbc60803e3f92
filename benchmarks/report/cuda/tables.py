"""The tables of the CUDA kernels as they are compiled: what bounds decode, and every kernel that is recorded."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.cuda_static import static_record
from benchmarks.cuda_static.kernels import HOT_KERNELS
from benchmarks.cuda_static.occupancy import GPUS, Gpu
from benchmarks.cuda_static.static_record import StaticRecord
from benchmarks.report.tables import markdown

NOT_RECORDED = "_Not recorded yet: `make cuda-records`._"
MAIN_KERNEL = "decode k8v8, 8 rows, head size 128"
BOUND = "issue_bound_bytes_per_clock"
DETAILED_ARCH = "90"
COLUMNS = {
    "registers": "registers",
    "shared": "shared memory",
    "resident_blocks": "blocks per SM",
    "instructions": "instructions",
    "work": "on the path counted",
    "before_copy": "before the first copy; with one sequence; integer divisions",
    "merge_rounds_of_66": "rounds of loads to merge 66 splits",
}


def newest(results: Path) -> dict[str, dict[str, StaticRecord]]:
    """The newest records by architecture and kernel."""
    records = static_record.read(results / static_record.RESULTS.name)
    archs = sorted({line.arch for line in records}, key=int)
    return {arch: static_record.newest(records, arch) for arch in archs}


def gpus(found: dict[str, dict[str, StaticRecord]]) -> list[tuple[str, Gpu]]:
    """The GPUs of the architectures recorded, with theirs."""
    return [(arch, gpu) for arch in found for gpu in GPUS[arch]]


def bounds_sentence(results: Path) -> str:
    """What issuing instructions and what memory allows, GPU by GPU, in a paragraph."""
    found = newest(results)
    if not found:
        return NOT_RECORDED
    clauses = [
        f"{gpu.name} (SM{arch}) {found[arch][MAIN_KERNEL].figures[BOUND]:.0f} against {gpu.memory_bound:.1f}"
        for arch, gpu in gpus(found)
    ]
    return (
        "<sub>GPUs, computed and not measured: bytes per clock and multiprocessor that issuing the instructions of "
        f"`k8v8` decode allows, against what memory delivers: {', '.join(clauses)} "
        "([how](benchmarks/README.md#cuda-kernels-as-they-are-compiled)).</sub>"
    )


def bounds_table(results: Path) -> str:
    """Issue bound beside memory bound, for each GPU and decode kernel."""
    found = newest(results)
    if not found:
        return NOT_RECORDED
    kernels = [hot.name for hot in HOT_KERNELS if any(BOUND in found[a][hot.name].figures for a in found)]
    rows = [
        [
            f"{gpu.name} (SM{arch})",
            f"{gpu.memory_bound:.1f}",
            *(_bound(found[arch][name], gpu) for name in kernels),
        ]
        for arch, gpu in gpus(found)
    ]
    head = ["GPU", "memory", *(name.removeprefix("decode ") for name in kernels)]
    return f"{markdown(head, rows)}\n\n{_source(found)}"


def _bound(line: StaticRecord, gpu: Gpu) -> str:
    if not line.figures["resident_blocks"]:
        return "does not fit"
    bound = line.figures[BOUND]
    return f"{bound:.1f}, {bound / gpu.memory_bound:.1f}x"


def kernels_table(results: Path) -> str:
    """Every recorded kernel on one architecture."""
    kernels = newest(results).get(DETAILED_ARCH)
    if not kernels:
        return NOT_RECORDED
    rows = [[name, *_row(line.figures)] for name, line in kernels.items()]
    table = markdown([f"kernel, on SM{DETAILED_ARCH}", *COLUMNS.values()], rows)
    return f"{table}\n\n{_source({DETAILED_ARCH: kernels})}"


def _row(figures: static_record.Figures) -> list[str]:
    cells = {name: f"{figures[name]:,}" for name in COLUMNS if name in figures}
    cells["shared"] = f"{figures['static_shared'] + figures['dynamic_shared']:,}"
    cells["work"] = _work(figures)
    if "before_copy_instructions" in figures:
        names = ("before_copy_instructions", "before_copy_instructions_of_one", "before_copy_divisions")
        cells["before_copy"] = "; ".join(f"{figures[name]:,}" for name in names)
    return [cells.get(column, "") for column in COLUMNS]


def _work(figures: static_record.Figures) -> str:
    if "loop_instructions" in figures:
        multiplications = f"{figures['loop_hmma'] + figures['loop_imma']} MMA"
        conversions = f"{figures['loop_prmt']} PRMT, {figures['loop_hadd2']} HADD2"
        return f"{figures['loop_instructions']:,} per {figures['tile_bytes']:,} bytes: {multiplications}, {conversions}"
    parts = [f"{figures['row_instructions']:g} per row of K and V"] if "row_instructions" in figures else []
    ways = {
        access: [figures[f"{plane}_{access}_ways"] for plane in "kv" if f"{plane}_{access}_ways" in figures]
        for access in ("store", "load")
    }
    parts += [f"{access}s {found[0]}-way (K), {found[1]}-way (V)" for access, found in ways.items() if found]
    return "; ".join(parts)


def _source(found: dict[str, dict[str, StaticRecord]]) -> str:
    last = max((line for kernels in found.values() for line in kernels.values()), key=lambda line: line.utc)
    commit = last.commit + (" with local changes" if last.dirty else "")
    path = f"benchmarks/results/{static_record.RESULTS.name}/{static_record.WHAT}.jsonl"
    return f"<sub>nvcc {last.nvcc}; {last.utc[:10]}; commit {commit}; `{path}`.</sub>"


TABLES: dict[str, Callable[[Path], str]] = {"cuda_bounds": bounds_table, "cuda_kernels": kernels_table}

"""The tables and plots of the quantization ladder, beside the numbers of arXiv 2601.04719."""

from pathlib import Path
from statistics import median

from benchmarks.ladder.operands import COPY, OPERATIONS
from benchmarks.report.tables import Group, markdown, source, times
from vllm_int8kv.cache import ladder
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import Record

SCRIPT = "_Not measured yet: `python -m benchmarks.ladder`._"

PAPER = {
    # (tokens, channels): CPU loop q + dq in s, fastest GPU kernel q + dq in ms, L2 error, attention-score error
    (1024, 64): (0.0006 + 0.0004, 0.011 + 0.010, 0.5815, 0.00845),
    (2048, 128): (0.0027 + 0.0017, 0.013 + 0.012, 1.1635, 0.0121),
    (16384, 256): (0.0745 + 0.0443, 0.087 + 0.101, 4.647, 0.0166),
    (65536, 256): (0.583 + 0.272, 0.324 + 0.401, 9.212, 0.0171),
    (131072, 256): (1.103 + 0.608, 0.643 + 0.816, 12.823, 0.0171),
    (131072, 1024): (5.47 + 3.14, 2.536 + 3.228, 16.589, 0.0336),
    (131072, 2048): (15.6 + 6.98, 5.074 + 6.479, 17.525, 0.0479),
    (131072, 4096): (34.4 + 14.5, 10.17 + 12.99, 19.265, 0.0669),
    (131072, 8192): (53.6 + 30.5, 20.85 + 26.06, 22.335, 0.0949),
    (262144, 128): (1.09 + 0.707, 0.640 + 0.798, 12.825, 0.0117),
}
"""From the log in the authors' repository (github.com/MaanasTaneja/cuda-kv-cache-compression, raw_results.txt)."""

Shape = tuple[int, int]
Measured = dict[tuple[str, int, str], Record]
"""The records of one shape by (variant, threads, operation)."""


def shapes(results: Path, device: str = "cpu") -> dict[Shape, Measured]:
    """What was measured last on a kind of device, fp32, by shape from small to large."""
    records = [line for line in record.read("quantize", results) if line.case["device"] == device]
    found: dict[Shape, Measured] = {}
    for line in record.latest(records):
        if line.device == records[-1].device and line.case["dtype"] == "float32":
            shape = (line.case["num_tokens"], line.case["num_channels"])
            found.setdefault(shape, {})[line.impl, line.num_threads, line.case["operation"]] = line
    return dict(sorted(found.items(), key=lambda item: (item[0][0] * item[0][1], item[0][1])))


def threads_of(measured: Measured) -> int:
    """The most threads of a variant."""
    return max(threads for _, threads, _ in measured)


def both_ways(measured: Measured, variant: str, threads: int) -> float:
    """Milliseconds of quantization with given scales and the way back."""
    return sum(measured[variant, threads, name].median_us for name in ("quantize", "dequantize")) / 1e3


def ladder_table(results: Path) -> str:
    """All shapes beside the paper, then every variant of one shape."""
    found = shapes(results)
    if not found:
        return SCRIPT
    rows = []
    for shape, measured in found.items():
        most = threads_of(measured)
        loop, plain, simd = (both_ways(measured, variant, 1) for variant in ("column_strided", "row_major", "simd"))
        fastest = both_ways(measured, "vectorized", most) if ("vectorized", most, "quantize") in measured else simd
        paper = ["-"] * 3
        if shape in PAPER:
            cpu, gpu = PAPER[shape][0] * 1e3, PAPER[shape][1]
            paper = [milliseconds(cpu), milliseconds(gpu), times(cpu / gpu)]
        rows.append(
            [
                f"{shape[0]} x {shape[1]}",
                *paper,
                *(milliseconds(value) for value in (loop, plain, simd, fastest)),
                times(loop / simd),
                times(plain / simd),
            ]
        )
    head = ["tokens x channels", "paper: CPU loop", "paper: best GPU kernel", "paper's speed-up", "its loop here"]
    head += ["plain loop", "`simd`, 1 thread", f"`vectorized`, {most} threads", "`simd` vs its loop"]
    head += ["`simd` vs plain loop"]
    lines = [line for measured in found.values() for line in measured.values()]
    return (
        "Quantization and the way back together, in ms, scales given:\n\n"
        f"{markdown(head, rows)}\n\n{rungs(found)}\n\n{source(as_groups(lines))}\n\n{gpu_table(results)}"
    )


def gpu_table(results: Path) -> str:
    """The CUDA rungs beside the paper's fastest, where a GPU was there."""
    found = shapes(results, "cuda")
    if not found:
        return "_No GPU time yet: `python -m benchmarks.ladder --device cuda`._"
    rows = []
    for shape, measured in found.items():
        threads = threads_of(measured)
        paper = milliseconds(PAPER[shape][1]) if shape in PAPER else "-"
        row = [f"{shape[0]} x {shape[1]}", paper]
        row += [milliseconds(both_ways(measured, v, threads)) for v in ladder.CUDA_VARIANTS if v != "fused"]
        fused, fastest = measured["fused", threads, OPERATIONS[1]], measured["vectorized", threads, OPERATIONS[0]]
        row += [milliseconds(fused.median_us / 1e3)]
        row += [f"{(line.metrics or {})['frac_of_copy']:.0%}" for line in (fastest, fused)]
        rows.append(row)
    head = ["tokens x channels", "paper: best GPU kernel", *(f"`{v}`" for v in ladder.CUDA_VARIANTS[:-1])]
    head += ["`fused`, quantization only", "`vectorized` quantization, of copy bandwidth", "`fused`, of copy bandwidth"]
    lines = [line for measured in found.values() for line in measured.values()]
    return f"On a GPU, in ms:\n\n{markdown(head, rows)}\n\n{source(as_groups(lines))}"


def rungs(found: dict[Shape, Measured]) -> str:
    """Every variant and operation of the largest shape that the default run measures."""
    shape = (131072, 1024) if (131072, 1024) in found else list(found)[-1]
    rows = []
    for (variant, threads, operation), line in found[shape].items():
        if variant == COPY:
            continue
        extra = line.metrics or {}
        rows.append(
            [
                f"`{variant}`, {operation.replace('_', ' ')}",
                str(threads),
                milliseconds(line.median_us / 1e3),
                f"{milliseconds(line.p10_us / 1e3)} to {milliseconds(line.p90_us / 1e3)}",
                f"{line.gb_per_s:.1f}",
                f"{extra['frac_of_copy']:.0%}",
                times(extra["vs_column_strided"]) if "vs_column_strided" in extra else "-",
                times(extra["vs_row_major"]) if "vs_row_major" in extra else "-",
            ]
        )
    rows.sort(key=lambda row: [name in row[0] for name in ("dequantize", "with scales")])
    head = ["variant", "threads", "ms", "p10 to p90", "GB/s", "of copy bandwidth", "vs paper's loop", "vs plain loop"]
    return f"{shape[0]} x {shape[1]}, every rung:\n\n{markdown(head, rows)}"


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def as_groups(lines: list[Record]) -> list[Group]:
    return [{str(number): line for number, line in enumerate(lines)}]


def errors(results: Path, data: str) -> list[Record]:
    """The newest error records of a kind of data, on the device measured last."""
    records = [line for line in record.read("quantize_error", results) if line.case["data"].startswith(data)]
    return [line for line in record.latest(records) if line.device == records[-1].device]


def errors_table(results: Path) -> str:
    """Uniform data beside the paper and theory, then the model."""
    uniform, model = errors(results, "uniform"), errors(results, "SmolLM2")
    if not uniform or not model:
        return SCRIPT
    rows = []
    for line in sorted(uniform, key=lambda line: (line.case["num_channels"], line.case["num_tokens"])):
        shape, found = (line.case["num_tokens"], line.case["num_channels"]), line.metrics or {}
        _, _, paper_l2, paper_score = PAPER.get(shape, (0, 0, None, None))
        rows.append(
            [
                f"{shape[0]} x {shape[1]}",
                f"{found['max_abs_error']:.6f}",
                "-" if paper_l2 is None else f"{paper_l2:.4g}",
                f"{found['l2_error']:.4g}",
                f"{found['theory_l2_error']:.4g}",
                "-" if paper_score is None else f"{paper_score:.3g}",
                f"{found['score_error_plain']:.3g}",
                f"{found['theory_score_error_plain']:.3g}",
                f"{found['score_error_scaled']:.2e}",
            ]
        )
    head = ["tokens x channels", "max error", "L2: paper", "L2", "theory", "score: paper", "score", "theory"]
    first = markdown([*head, "score / sqrt(d)"], rows)
    rows = []
    for impl in ("per_channel", "per_channel_static", "int8_custom"):
        layers = [line.metrics or {} for line in model if line.impl == impl]
        names = ("e_k", "e_v", "e_a", "e_o", "score_error_scaled", "max_abs_error_key")
        spread = [sorted(layer[name] for layer in layers) for name in names]
        rows.append([f"`{impl}`", *(f"{median(values):.2g}, {values[-1]:.2g}" for values in spread)])
    case = model[0].case
    head = ["scales", "e_k", "e_v", "e_a", "e_o", "score / sqrt(d)", "max error of K"]
    intro = (
        f"SmolLM2-135M, {case['num_tokens']} tokens through vLLM, median and largest of "
        f"{len({line.case['layer'] for line in model})} layers (e: KVTuner's errors, relative to the norm):"
    )
    return f"U(-1, 1):\n\n{first}\n\n{intro}\n\n{markdown(head, rows)}\n\n{source(as_groups(uniform + model))}"


TABLES = {"quantize": ladder_table, "quantize_error": errors_table}


def rate_plot_data(results: Path) -> list[Group]:
    """Per size the rate of every variant, and of the copies, by `variant, threads`; the widest shape of a size."""
    by_size = {num_tokens * num_channels: measured for (num_tokens, num_channels), measured in shapes(results).items()}
    return [
        {
            f"{variant}, {threads}": line
            for (variant, threads, operation), line in measured.items()
            if operation in (OPERATIONS[0], COPY)
        }
        for measured in by_size.values()
    ]


def error_plot_data(results: Path) -> list[Group]:
    """Per width one shape of uniform data, the one with the most tokens up to 131072."""
    by_width: dict[int, Record] = {}
    for line in sorted(errors(results, "uniform"), key=lambda line: line.case["num_tokens"]):
        if line.case["num_tokens"] <= 131072:
            by_width[line.case["num_channels"]] = line
    return [{"uniform": by_width[width]} for width in sorted(by_width)]

"""The accuracy tables of benchmarks/README.md as Markdown, from the records in `results/accuracy/`."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import CACHES, FORMATS, OURS, AccuracyRecord
from benchmarks.accuracy.schemes import SCHEMES, SECTIONS
from benchmarks.report.tables import markdown
from vllm_int8kv.cache.formats import FORMATS as ALL_FORMATS
from vllm_int8kv.evaluation.eval_report import PATH_MEANINGS

COMPILED = "auto:enforce_eager=false"
"""The same cache, but other arithmetic: models are not compiled for these measurements."""
STRESS = 128
"""Factor of the outliers in keys that tables show."""


def find(records: list[AccuracyRecord], impl: str, **case: object) -> AccuracyRecord | None:
    """The newest record of a cache whose case has these values."""
    found = [line for line in records if line.impl == impl and case.items() <= line.case.items()]
    return max(found, key=lambda line: (sum(line.case["texts"].values()), line.utc), default=None)


def divergence(line: AccuracyRecord | None, path: str = "decode") -> str:
    """KL per token of a path, with half the width of its interval."""
    if line is None:
        return "-"
    kl = line.metrics["paths"][path]["kl_per_token"]
    return f"{kl['value']:.1e} ± {(kl['high'] - kl['low']) / 2:.0e}"


def engine_table(results: Path) -> str:
    """KV cache dtypes through vLLM."""
    records = accuracy_record.latest(accuracy_record.read("engine", results / "accuracy"))
    clean = {impl: find(records, impl, stress=1, dtype="float32") for impl in CACHES}
    if any(line is None for line in clean.values()):
        return "_Not measured yet: `python -m benchmarks.accuracy engine`._"
    head = ["KV cache", "KL per token", "perplexity", "same top token", "equal greedy tokens"]
    columns = {"KL, bf16 arithmetic": ("bfloat16", 1), f"KL, keys with {STRESS}x outliers": ("float32", STRESS)}
    rows = []
    for impl, label in CACHES.items():
        line = clean[impl]
        path, greedy = line.metrics["paths"]["decode"], line.metrics["first_divergence"]
        change = path["perplexity_change"]
        others = [find(records, impl, dtype=dtype, stress=stress) for dtype, stress in columns.values()]
        rows.append(
            [
                label,
                divergence(line),
                f"{change['value']:+.2%} ± {(change['high'] - change['low']) / 2:.2%}",
                f"{path['top1_agreement']['value']:.1%}",
                f"{greedy['mean_tokens']:.0f} of {greedy['max_tokens']}",
                *map(divergence, others),
            ]
        )
    ours = clean[OURS]
    note = f"{texts(ours)} ± is half a 95% bootstrap interval."
    noise = find(records, COMPILED, dtype="bfloat16", stress=1)
    if noise is not None:
        note += (
            " In bf16 arithmetic any change, however small, draws all rounding errors anew: the unquantized model "
            f"compiled is {divergence(noise)} from itself not compiled."
        )
    return f"{markdown([*head, *columns], rows)}\n\n{note}\n\n{source(ours)}"


def paths_table(results: Path) -> str:
    """What tokens lose by how they read the cache, where every path was measured in one run."""
    records = accuracy_record.latest(accuracy_record.read("engine", results / "accuracy"))
    complete = [line for line in records if line.metrics["paths"].keys() == PATH_MEANINGS.keys()]
    found = {
        label: find(complete, impl, stress=1, dtype="float32")
        for impl, label in {"auto": "unquantized", **CACHES}.items()
    }
    measured = {label: line for label, line in found.items() if line is not None}
    if not measured:
        return "_Not measured yet: `python -m benchmarks.accuracy engine`._"
    rows = [
        [label, *(divergence(line, path) for path in PATH_MEANINGS), needles(line)] for label, line in measured.items()
    ]
    head = ["KV cache", *PATH_MEANINGS.values(), "hidden numbers found"]
    newest = next(iter(measured.values()))
    return f"{markdown(head, rows)}\n\n{texts(newest)}\n\n{source(newest)}"


def formats_table(results: Path) -> str:
    """Cache formats through vLLM, most bits first, and vLLM's FP8 cache."""
    records = accuracy_record.latest(accuracy_record.read("formats", results / "accuracy"))
    clean = {name: find(records, name, stress=1) for name in (*FORMATS, "fp8")}
    measured = {name: line for name, line in clean.items() if line is not None}
    if not measured:
        return "_Not measured yet: `python -m benchmarks.accuracy formats`._"
    fp8 = measured.get("fp8")
    rows = []
    for name, line in measured.items():
        kl, change = decode_kl(line), line.metrics["paths"]["decode"]["perplexity_change"]["value"]
        ratio = "-" if fp8 is None else f"{kl / decode_kl(fp8):.2g}x"
        capacity = [
            f"{256 * scale / (2 * 64 * scale if name == 'fp8' else ALL_FORMATS[name].content_bytes(64 * scale)):.2f}x"
            for scale in (1, 2)
        ]
        stressed = find(records, name, stress=STRESS, texts=line.case["texts"])
        growth = "-" if stressed is None else f"{decode_kl(stressed) / kl:.2f}x"
        rows.append([name, *capacity, divergence(line), ratio, f"{change:+.2%}", divergence(stressed), growth])
    head = ["format", "tokens of bf16, head size 64", "head size 128", "KL per token", "of fp8's", "perplexity"]
    head += [f"KL, keys with {STRESS}x outliers", "of its own without"]
    newest = max(measured.values(), key=lambda line: line.utc)
    return f"{markdown(head, rows)}\n\n{texts(newest)}\n\n{source(newest)}"


def decode_kl(line: AccuracyRecord) -> float:
    """KL per token of the decode steps."""
    return line.metrics["paths"]["decode"]["kl_per_token"]["value"]


def texts(line: AccuracyRecord) -> str:
    """What was scored, for below a table."""
    sizes = ", ".join(f"{name} ({count:,})" for name, count in line.case["texts"].items())
    return f"Texts and their tokens: {sizes}."


def needles(line: AccuracyRecord) -> str:
    """How many of the numbers hidden in contexts were found."""
    cells = line.metrics.get("needle", [])
    return f"{sum(cell['found'] for cell in cells):g} of {len(cells)}" if cells else "-"


def schemes_table(results: Path) -> str:
    """Quantization schemes in the simulator."""
    records = accuracy_record.latest(accuracy_record.read("schemes", results / "accuracy"))
    clean = {scheme.name: find(records, scheme.name, stress=1) for scheme in SCHEMES}
    measured = {name: line for name, line in clean.items() if line is not None}
    if not measured:
        return "_Not measured yet: `python -m benchmarks.accuracy schemes`._"
    meanings = {scheme.name: scheme.meaning for scheme in SCHEMES}
    head = ["scheme", "bits per element", "KL per token", "99.9% tail"]
    head += [f"KL, {STRESS}x outliers", f"99.9% tail, {STRESS}x outliers", "e_a", "e_o"]
    blocks = []
    for title, names in SECTIONS.items():
        rows = []
        for name in filter(measured.__contains__, names):
            line = measured[name]
            stressed = find(records, name, stress=STRESS, texts=line.case["texts"])
            errors = [f"{sum(line.metrics[key]) / len(line.metrics[key]):.1e}" for key in ("e_a", "e_o")]
            bits = f"{line.metrics['bits_per_element']:.2f}"
            rows.append([meanings[name], bits, *mean_and_tail(line), *mean_and_tail(stressed), *errors])
        if rows:
            blocks += [f"**{title}**", markdown(head, rows)]
    newest = max(measured.values(), key=lambda line: line.utc)
    return "\n\n".join([*blocks, texts(newest), source(newest)])


def mean_and_tail(line: AccuracyRecord | None) -> list[str]:
    """KL per token and its 99.9 % quantile."""
    return ["-", "-"] if line is None else [f"{line.metrics[key]:.1e}" for key in ("kl_per_token", "kl_p999")]


def source(line: AccuracyRecord) -> str:
    """Where the numbers come from, for below a table."""
    commit = line.commit + (" with local changes" if line.dirty else "")
    return (
        f"<sub>{line.case['model']}; {line.device.split(',')[0]}; {line.utc[:10]}; PyTorch {line.torch}, vLLM "
        f"{line.vllm}; commit {commit}; `benchmarks/results/accuracy/{line.what}.jsonl`.</sub>"
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "accuracy": engine_table,
    "accuracy_paths": paths_table,
    "accuracy_formats": formats_table,
    "schemes": schemes_table,
}

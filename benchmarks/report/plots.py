"""The plots of README.md and benchmarks/README.md, from the records."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import OURS, PLAIN, AccuracyRecord
from benchmarks.report.accuracy_tables import find
from benchmarks.report.tables import gpu_decode_groups, impls_of, machines, sizes
from benchmarks.report.throughput_tables import pressure_data
from vllm_int8kv.commands.bench.summary import by_cache, capacity, label
from vllm_int8kv.evaluation.record import LABELS, Group
from vllm_int8kv.evaluation.sensitivity import draw_bars

MAX_PLOT_BYTES = 150_000
PANELS = {(OURS, 1): "int8_custom", (PLAIN, 128): "plain INT8, keys with 128x outliers"}
"""Cache and factor of the outliers: what a panel shows."""


def decode_plot_data(results: Path) -> list[Group]:
    """Decode at 8 sequences, GQA 4, head size 128 and the most threads measured, by context; of the first machine."""
    found = [
        group
        for group in next(iter(machines("decode", results)), [])
        if (case := group["auto"].case)["num_seqs"] == 8 and case["num_heads"] == 32 and case["head_size"] == 128
    ]
    most = max((group["auto"].num_threads for group in found), default=0)
    return sorted((group for group in found if group["auto"].num_threads == most), key=sizes)


def digest(found: list[Group]) -> str:
    """Identifies the records that a plot was drawn from; kept in the PNG, since its pixels vary with matplotlib."""
    lines = [repr(line) for group in found for line in group.values()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def save(figure: Any, found: list[Group], path: Path, caption: str) -> None:
    """Write a plot with the digest of its records, and close it."""
    import matplotlib.pyplot as plt  # only the plots need it, and it is slow to import

    figure.supxlabel(caption, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": digest(found)})
    plt.close(figure)


def draw_decode(found: list[Group], path: Path) -> None:
    """Bandwidth against context length on CPU."""
    newest = found[-1]["int8_custom"]
    caption = f"{newest.device.split(',')[0]}, {newest.num_threads} threads, {newest.utc[:10]}"
    labels = {impl: LABELS[impl] for impl in impls_of(found)}
    _draw_bandwidth(found, labels, "streaming read", path, caption)


def draw_gpu_decode(found: list[Group], path: Path) -> None:
    """The same on a GPU, with everything that was installed there."""
    newest = found[-1]["int8_custom"]
    names = {impl: impl for group in found for impl in group}
    _draw_bandwidth(found, names, "read or copy", path, f"{newest.device}, {newest.utc[:10]}")


def _draw_bandwidth(found: list[Group], labels: dict[str, str], bound_label: str, path: Path, caption: str) -> None:
    """A line per implementation; the dashed one is what the memory can deliver."""
    import matplotlib.pyplot as plt  # only the plot needs it, and it is slow to import

    contexts = [group["int8_custom"].case["seq_len"] for group in found]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    bound = [max(line.read_gb_per_s for line in group.values()) for group in found]
    axes.plot(contexts, bound, "--", color="black")
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(bound_label, (contexts[-1], bound[-1]), **beside)
    for impl, name in labels.items():
        points = [(x, group[impl].gb_per_s) for x, group in zip(contexts, found, strict=True) if impl in group]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o")
        axes.annotate(name, points[-1], **beside, color=line.get_color())
    case = found[-1]["int8_custom"].case
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set_xlim(contexts[0] * 0.8, contexts[-1] * 4)
    axes.set_ylim(0, 1.1 * max(bound))
    axes.set_xlabel("context, tokens per sequence")
    axes.set_ylabel("KV cache read, GB/s")
    heads = f"{case['num_heads']}/{case['num_kv_heads']} heads, head size {case['head_size']}"
    axes.set_title(f"Decode attention: {case['num_seqs']} sequences, {heads}")
    save(figure, found, path, caption)


def draw_pressure(found: list[Group], path: Path) -> None:
    """Output tokens per second against requests in flight; the dashed lines are what each cache holds."""
    import matplotlib.pyplot as plt

    flights = [group["auto"].case["max_concurrency"] for group in found]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    for impl, measured in by_cache(found).items():
        points = [(record.case["max_concurrency"], record.tok_per_s) for record in measured if record]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o")
        axes.annotate(label(impl), points[-1], **beside, color=line.get_color())
        fits = capacity(next(record for record in reversed(measured) if record))
        axes.axvline(fits, linestyle="--", color=line.get_color())
        axes.annotate(f" {fits:.1f} fit", (fits, 0), xytext=(2, 6), textcoords="offset points", color=line.get_color())
    newest = found[-1]["int8_custom"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(flights, [str(count) for count in flights])
    axes.set_xlim(flights[0] * 0.8, flights[-1] * 3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("output tokens/s, prefill included")
    case = newest.case
    axes.set_title(f"{case['model']}, {case['input_len']} in, {case['output_len']} out, the same KV memory")
    save(figure, found, path, f"{newest.device.split(',')[0]}, {newest.num_threads} core, {newest.utc[:10]}")


def layers_plot_data(results: Path) -> list[dict[str, AccuracyRecord]]:
    """The panels, by their titles; nothing unless all were measured."""
    records = accuracy_record.latest(accuracy_record.read("layers", results / "accuracy"))
    found = {title: find(records, cache, stress=stress) for (cache, stress), title in PANELS.items()}
    return [] if None in found.values() else [found]


def draw_layers(found: list[dict[str, AccuracyRecord]], path: Path) -> None:
    """A panel per cache; red is what `vllm-int8kv eval --sensitivity` suggests to leave unquantized."""
    import matplotlib.pyplot as plt  # only the plot needs it, and it is slow to import

    (panels,) = found
    figure, row = plt.subplots(1, len(panels), figsize=(9, 3.5), layout="constrained")
    for axes, (title, line) in zip(row, panels.items(), strict=True):
        draw_bars(line.metrics["layers"], [int(layer) for layer in line.metrics["policy"]], axes)
        axes.set_title(f"{title}: all layers {line.metrics['kl_all_layers']:.1e}", fontsize=10)
    case = next(iter(panels.values())).case
    tokens = sum(case["texts"].values())
    dates = " and ".join(dict.fromkeys(line.utc[:10] for line in panels.values()))
    caption = f"{case['model']}, {tokens:,} tokens, one layer in INT8 at a time, {dates}"
    save(figure, found, path, caption)


PLOTS: dict[str, tuple[Callable[[Path], list[Group]], Callable[[list[Group], Path], None]]] = {
    "decode": (decode_plot_data, draw_decode),
    "decode_gpu": (gpu_decode_groups, draw_gpu_decode),
    "memory_pressure": (pressure_data, draw_pressure),
    "layers": (layers_plot_data, draw_layers),
}
"""By file name: where the data comes from and who draws it."""


def plot_problem(path: Path, found: list[Group]) -> str | None:
    """Why a plot does not show the records, if so."""
    if not path.exists():
        return f"{path.name} is missing"
    with Image.open(path) as image:
        if image.info.get("Description") != digest(found):
            return f"{path.name} was drawn from other records"
    return f"{path.name} is over {MAX_PLOT_BYTES} bytes" if path.stat().st_size > MAX_PLOT_BYTES else None

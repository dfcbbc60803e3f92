"""The plot of what each layer loses to INT8, from `results/accuracy/layers.jsonl`."""

from pathlib import Path

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import OURS, PLAIN, AccuracyRecord
from benchmarks.report.accuracy_tables import find
from benchmarks.report.plots import save
from vllm_int8kv.evaluation.sensitivity import draw_bars

PANELS = {(OURS, 1): "int8_custom", (PLAIN, 128): "plain INT8, keys with 128x outliers"}
"""Cache and factor of the outliers: what a panel shows."""


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
    newest = panels[PANELS[OURS, 1]]
    tokens = sum(newest.case["texts"].values())
    caption = f"{newest.case['model']}, {tokens:,} tokens, one layer in INT8 at a time, {newest.utc[:10]}"
    save(figure, found, path, caption)


PLOTS = {"layers": (layers_plot_data, draw_layers)}

"""What `tune` shows and writes: the frontier as a table and a plot, and the policy."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

COLORS = {"tuned": "tab:blue", "uniform": "tab:green", "peer": "tab:red", "file": "tab:purple"}
LABELS = {
    "fp8": "FP8 e4m3",
    "plain:k8v8": "plain INT8 per (token, head)",
    "plain:k4v4": "plain INT4 per (token, head)",
}
"""What tables call the caches of others."""


def label_of(point: Mapping[str, Any]) -> str:
    """The name of a point as tables show it."""
    return LABELS.get(point["name"], point["name"])


def print_tuning(report: Mapping[str, Any], console: Console) -> None:
    """Show a report of `tune`."""
    columns = (
        "policy",
        "bits",
        "with scales",
        "tokens vs auto",
        "KL predicted",
        "KL",
        "KL held out",
        "KL 99.9 %",
        "PPL",
    )
    table = Table(title=f"{report['model']}: KL per token (nats)")
    for column in columns:
        table.add_column(column, justify="left" if column == "policy" else "right")
    for point in sorted(report["points"], key=lambda point: -point["bits_with_scales"]):
        held_out, predicted = point["held_out"], point["predicted_kl"]
        table.add_row(
            label_of(point),
            f"{point['bits']:.2f}",
            f"{point['bits_with_scales']:.2f}",
            f"{point['tokens_ratio']:.2f}x",
            "" if predicted is None else f"{predicted:.1e}",
            f"{point['search']['kl_per_token']['value']:.1e}",
            f"{held_out['kl_per_token']['value']:.1e}",
            f"{held_out['kl_p999']:.1e}",
            f"{held_out['perplexity_change']['value']:+.2%}",
            style="bold" if point["name"] == report["pick"] else None,
        )
    console.print(table)
    console.print(
        "Bits are means over the elements of all layers. Predicted: the sum of what every layer loses by itself. KL "
        "and prediction on the half of the texts that the search saw, the columns behind them on the other half.",
        style="dim",
    )
    if report["pick"] is None:
        return
    pick = picked(report)
    interval = pick["held_out"]["kl_per_token"]
    console.print(
        f"Picked: {pick['name']}, {pick['tokens_ratio']:.2f}x the tokens of auto, KL {interval['value']:.1e} "
        f"({interval['low']:.1e} to {interval['high']:.1e}) on text that the search did not see."
    )


def picked(report: Mapping[str, Any]) -> Mapping[str, Any]:
    """The point that was picked."""
    return next(point for point in report["points"] if point["name"] == report["pick"])


def write_policy(report: Mapping[str, Any], path: Path) -> None:
    """Write the picked policy to a file that the option `layer_policy` reads."""
    pick = picked(report)
    held_out = pick["held_out"]["kl_per_token"]
    head = (
        f"# vllm-int8kv tune {report['model']}: {pick['bits']:.2f} bits, {pick['bits_with_scales']:.2f} with scales, "
        f"{pick['tokens_ratio']:.2f}x the tokens\n# of an unquantized cache, KL {held_out['value']:.2g} nats per token "
        f"({held_out['low']:.2g} to {held_out['high']:.2g}) on text that the search did not see.\n"
    )
    policy = {int(layer): name for layer, name in pick["policy"].items()}
    path.write_text(head + yaml.safe_dump(policy))


def draw_tuning(report: Mapping[str, Any], path: Path) -> None:
    """Plot KL on the held-out half against tokens in the same memory.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_points(report, axes)
    axes.set_title(f"{report['model']}: what memory costs in accuracy")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_points(report: Mapping[str, Any], axes: Any) -> None:
    """Draw the points into matplotlib axes; the tuned ones as a line."""

    def where(point: Mapping[str, Any]) -> tuple[float, float]:
        return point["tokens_ratio"], point["held_out"]["kl_per_token"]["value"]

    tuned = sorted((point for point in report["points"] if point["kind"] == "tuned"), key=where)
    if tuned:
        axes.plot(*zip(*map(where, tuned), strict=True), "o-", color=COLORS["tuned"], label="tuned, bits by layer")
    for point in report["points"]:
        if point["kind"] != "tuned":
            axes.plot(*where(point), "s", color=COLORS[point["kind"]])
            axes.annotate(label_of(point), where(point), xytext=(6, 3), textcoords="offset points", fontsize=8)
    if report["pick"] is not None:
        axes.plot(*where(picked(report)), "o", markersize=12, markerfacecolor="none", color="black", label="picked")
    axes.set_yscale("log")
    axes.set_xlabel("tokens in the same memory, against the unquantized cache")
    axes.set_ylabel("KL per token, nats")
    axes.grid(alpha=0.3)
    if report["pick"] is not None:
        axes.legend()

"""The two plots of the quantization ladder: bandwidth against size, and error against channels."""

from pathlib import Path

from benchmarks.report.ladder.tables import error_plot_data, rate_plot_data
from benchmarks.report.plots import save
from benchmarks.report.tables import Group


def draw_rates(found: list[Group], path: Path) -> None:
    """GB/s against the number of elements per variant; dashed lines are what a copy reaches."""
    import matplotlib.pyplot as plt  # only the plots need it, and it is slow to import

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    names = sorted({name for group in found for name in group}, key=lambda name: -_rate(found[-1], name))
    for name in names:
        variant, threads = name.split(", ")
        points = [(_elements(group), _rate(group, name)) for group in found if name in group]
        style = {"linestyle": "--", "color": "black"} if variant == "copy" else {"marker": "o"}
        style["alpha"] = 0.5 if variant == "copy" and threads != "1" else 1.0
        label = f"{variant}, {threads} thread{'s' if threads != '1' else ''}"
        axes.plot(*zip(*points, strict=True), label=label, **style)
    newest = next(iter(found[-1].values()))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("elements, fp32")
    axes.set_ylabel("bytes that must move, GB/s")
    axes.set_title("Per-channel quantization, scales given, operands cold")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, found, path, f"{newest.device.split(',')[0]}, {newest.utc[:10]}")


def draw_errors(found: list[Group], path: Path) -> None:
    """Errors of U(-1, 1) against the number of channels; dashed lines are the closed forms."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    lines = [group["uniform"] for group in found]
    widths = [line.case["num_channels"] for line in lines]
    for name, label in (
        ("score_error_plain", "|q . k - q . k'|, the paper's"),
        ("max_abs_error", "largest |x - x'|"),
        ("score_error_scaled", "|q . k - q . k'| / sqrt(d)"),
    ):
        (drawn,) = axes.plot(widths, [line.metrics[name] for line in lines], marker="o", linestyle="", label=label)
        theory = [line.metrics[f"theory_{name}"] for line in lines]
        axes.plot(widths, theory, "--", color=drawn.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.set_xlabel("channels")
    axes.set_ylabel("error")
    axes.set_title("Errors of uniform data: measured, and by their closed forms (dashed)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, found, path, f"U(-1, 1), one scale per channel, {lines[-1].utc[:10]}")


def _elements(group: Group) -> int:
    case = next(iter(group.values())).case
    return case["num_tokens"] * case["num_channels"]


def _rate(group: Group, name: str) -> float:
    return group[name].gb_per_s if name in group else 0.0


PLOTS = {"quantize": (rate_plot_data, draw_rates), "quantize_error": (error_plot_data, draw_errors)}

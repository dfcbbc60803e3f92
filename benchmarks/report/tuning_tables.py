"""The tables and plots of bits by layer and of the KV store, from `results/accuracy`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import AccuracyRecord
from benchmarks.accuracy.tuning import FRONTIER, QUESTIONS, STABLE
from benchmarks.engines.store import NO_STORE
from benchmarks.report.accuracy_tables import source
from benchmarks.report.plots import save
from benchmarks.report.tables import markdown
from vllm_int8kv.evaluation.tuning.report import draw_points, label_of

NOT_TUNED = "_Not measured yet: `python -m benchmarks.accuracy tune`._"
NOT_STORED = "_Not measured yet: `python -m benchmarks.engines.store`._"
NOT_SCORED = "_Not measured yet: `python -m benchmarks.engines.store --scores --windows 6`._"
STEPS_NOT_TIMED = "_Not measured yet: `python -m benchmarks.engines.store --steps`._"


def read(what: str, results: Path) -> dict[str, AccuracyRecord]:
    """The newest records of a file, by what was measured."""
    return {line.impl: line for line in accuracy_record.latest(accuracy_record.read(what, results / "accuracy"))}


def kl_of(interval: Mapping[str, float], digits: int = 1) -> str:
    """A divergence, with so many digits behind the point, and half the width of its interval."""
    return f"{interval['value']:.{digits}e} ± {(interval['high'] - interval['low']) / 2:.0e}"


def frontier_table(results: Path) -> str:
    """The frontier of a model, formats for all layers, and caches of others."""
    found = read("tuning", results)
    if FRONTIER not in found:
        return NOT_TUNED
    line = found[FRONTIER]
    head = [
        "policy",
        "bits",
        "with scales",
        "tokens vs bf16",
        "KL predicted",
        "KL",
        "KL held out",
        "99.9%",
        "perplexity",
    ]
    rows = []
    for point in sorted(line.metrics["points"], key=lambda point: -point["bits_with_scales"]):
        predicted = point["predicted_kl"]
        rows.append(
            [
                label_of(point),
                f"{point['bits']:.2f}",
                f"{point['bits_with_scales']:.2f}",
                f"{point['tokens_ratio']:.2f}x",
                "-" if predicted is None else f"{predicted:.1e}",
                f"{point['kl']:.1e}",
                kl_of(point["held_out_kl"]),
                f"{point['held_out_kl_p999']:.1e}",
                f"{point['held_out_perplexity_change']['value']:+.2%}",
            ]
        )
    return f"{markdown(head, rows)}\n\n{source(line)}"


def questions_table(results: Path) -> str:
    """What the limits, pairs and searches give, beside one format for all layers."""
    found = read("tuning", results)
    asked = [question for question in QUESTIONS if question != FRONTIER]
    if not {FRONTIER, *asked} <= found.keys():
        return NOT_TUNED
    uniform = _points(found[FRONTIER])
    head = ["choice", "bits", "tokens vs bf16", "KL predicted", "KL", "KL held out", "vs k6v4", "vs FP8"]
    rows = [_row(name, uniform[name], uniform) for name in ("fp8", "k6v4")]
    for question in asked:
        points = _points(found[question])
        rows.append(_row(question, points[found[question].metrics["pick"]], uniform))
    if STABLE in found:
        rows += [
            _row(f"5.0 bits, chosen by the text {point['name']} alone", point, uniform)
            for point in found[STABLE].metrics["points"]
            if point["kind"] == "file"
        ]
    return f"{markdown(head, rows)}\n\n{source(found[FRONTIER])}"


def _points(line: AccuracyRecord) -> dict[str, Mapping[str, Any]]:
    return {point["name"]: point for point in line.metrics["points"]}


def _row(name: str, point: Mapping[str, Any], uniform: Mapping[str, Mapping[str, Any]]) -> list[str]:
    value, predicted = point["held_out_kl"]["value"], point["predicted_kl"]
    return [
        label_of({"name": name}),
        f"{point['bits']:.2f}",
        f"{point['tokens_ratio']:.2f}x",
        "-" if predicted is None else f"{predicted:.1e}",
        f"{point['kl']:.1e}",
        kl_of(point["held_out_kl"]),
        *(f"{value / uniform[other]['held_out_kl']['value']:.2f}" for other in ("k6v4", "fp8")),
    ]


def sides_table(results: Path) -> str:
    """What the bits of K and of V cost, one layer at a time, summed over all layers."""
    found = read("tuning", results)
    if FRONTIER not in found:
        return NOT_TUNED
    layers = found[FRONTIER].metrics["layers"]
    bits = sorted({int(side[1:]) for side in layers[0]["kl"]}, reverse=True)
    rows = []
    for side, name in (("k", "K"), ("v", "V")):
        sums = [sum(layer["kl"][f"{side}{count}"] for layer in layers) for count in bits]
        rows.append([name, *(f"{value:.1e}" for value in sums)])
    spread = []
    for count in bits:
        values = [layer["kl"][f"k{count}"] for layer in layers]
        spread.append(f"{max(values) / min(values):.0f}x")
    rows.append(["K, most against least sensitive layer", *spread])
    return f"{markdown(['', *(f'{count} bits' for count in bits)], rows)}\n\n{source(found[FRONTIER])}"


def stores(results: Path) -> list[dict[str, AccuracyRecord]]:
    """What was measured of the store, by codec, of each model by itself: the runs of one commit, as codecs change."""
    by_model: dict[str, dict[str, AccuracyRecord]] = {}
    for line in accuracy_record.latest(accuracy_record.read("store", results / "accuracy")):
        by_model.setdefault(line.case["model"], {})[line.impl] = line
    measured = [found for found in by_model.values() if NO_STORE in found]
    same = [{k: v for k, v in found.items() if v.commit == found[NO_STORE].commit} for found in measured]
    return [found for found in same if len(found) > 1]


def simulated_like(line: AccuracyRecord, results: Path) -> dict[str, float]:
    """KL of the codecs of the store without an engine, for the model and the texts of a record."""
    lines = accuracy_record.latest(accuracy_record.read("store_simulated", results / "accuracy"))
    alike = (own for own in lines if all(own.case[key] == line.case[key] for key in ("model", "texts")))
    return {own.impl: own.metrics["kl_per_token"] for own in alike}


def store_table(results: Path) -> str:
    """Every codec, model by model: time to the first token, bytes, speed, divergence."""
    found = stores(results)
    return "\n\n".join(_store_table(own, simulated_like(own[NO_STORE], results)) for own in found) or NOT_STORED


def _store_table(found: Mapping[str, AccuracyRecord], simulated: Mapping[str, float]) -> str:
    without, exact = found[NO_STORE], found.get("exact")
    lengths = without.case["lengths"]
    head = [without.case["model"], *(f"TTFT, {length:,} tokens" for length in lengths)]
    head += [
        "bytes per token",
        "vs bf16",
        "vs `exact`",
        "encode, decode, fill GB/s",
        "KL behind a prefix",
        "simulated",
        "KL, served so",
    ]
    prefill = [f"{seconds:.2f} s" for seconds in without.metrics["ttft_s"]]
    rows = [["no store: prefill", *prefill, *["-"] * 7]]
    for codec, line in found.items():
        if codec == NO_STORE or codec.startswith("served "):
            continue
        metrics = line.metrics
        shares = [a / b for a, b in zip(metrics["ttft_s"], without.metrics["ttft_s"], strict=True)]
        times = [f"{a:.2f} s, {b:.1%}" for a, b in zip(metrics["ttft_s"], shares, strict=True)]
        base, size = codec.partition("+")[0], metrics["file_bytes_per_token"]
        served = found.get("served int8_custom" if base == "exact" else f"served int8_custom:format={base}")
        rows.append(
            [
                f"`{codec}`",
                *times,
                f"{size:,.0f}",
                f"{metrics['bf16_bytes_per_token'] / size:.2f}x less",
                "-" if exact is None else f"{size / exact.metrics['file_bytes_per_token']:.2f}",
                ", ".join(f"{metrics[f'{what}_gb_per_s']:.2f}" for what in ("encode", "decode", "put")),
                kl_of(metrics["scores"]["kl_per_token"]),
                f"{simulated[codec]:.1e}" if codec in simulated else "-",
                "-" if served is None else kl_of(served.metrics["scores"]["kl_per_token"]),
            ]
        )
    return f"{markdown(head, rows)}\n\n{source(without)}"


def store_scores_table(results: Path) -> str:
    """What codecs do to tokens behind a prefix, in an engine and simulated, of as much text as was scored."""
    lines = list(read("store_scores", results).values())
    if not lines:
        return NOT_SCORED
    rows = []
    for line in lines:
        kl, simulated = line.metrics["kl_per_token"], simulated_like(line, results).get(line.impl)
        compared = ["-", "-"] if simulated is None else [f"{simulated:.2e}", f"{kl['value'] / simulated:.2f}"]
        rows.append([f"`{line.impl}`", f"{line.metrics['num_tokens']:,}", kl_of(kl, digits=2), *compared])
    head = ["", "tokens", "KL behind a prefix", "simulated", "ratio"]
    return f"{markdown(head, rows)}\n\n{source(lines[-1])}"


def store_steps_table(results: Path) -> str:
    """How long steps take while blocks are saved, against those of the period beside."""
    lines = list(read("store_steps", results).values())
    if not lines:
        return STEPS_NOT_TIMED
    kinds = {"decode": "decode step", "prefill": "step with a prompt", "all": "all steps of a period"}
    rows = []
    for line in lines:
        cells = []
        for kind in kinds:
            alone = line.metrics[f"{kind}_s"]
            low, middle, high = np.percentile(np.divide(line.metrics[f"{kind}_saving_s"], alone), (25, 50, 75))
            cells += [f"{np.median(alone):.3g} s", f"{middle:.2f}x ({low:.2f} to {high:.2f})"]
        rows.append([f"`{line.impl}`", *cells, f"{np.median(line.metrics['rest_s']):.2f} s"])
    head = ["", *(cell for kind in kinds.values() for cell in (kind, "while saving")), "saved after them"]
    return f"{markdown(head, rows)}\n\n{source(lines[-1])}"


def tuning_plot_data(results: Path) -> list[dict[str, AccuracyRecord]]:
    """The frontier, if it was measured."""
    found = read("tuning", results)
    return [{FRONTIER: found[FRONTIER]}] if FRONTIER in found else []


def draw_tuning(found: Sequence[Mapping[str, AccuracyRecord]], path: Path) -> None:
    """KL on held-out text against tokens in the same memory."""
    import matplotlib.pyplot as plt  # only the plot needs it, and it is slow to import

    line = found[0][FRONTIER]
    points = [point | {"held_out": {"kl_per_token": point["held_out_kl"]}} for point in line.metrics["points"]]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    draw_points({"points": points, "pick": line.metrics["pick"]}, axes)
    axes.set_title(f"{line.case['model']}: what memory costs in accuracy")
    save(figure, found, path, f"{line.case['model']}, text that the search did not see, {line.utc[:10]}")


def store_plot_data(results: Path) -> list[dict[str, AccuracyRecord]]:
    """Prefill and every codec, if they were measured, model by model."""
    return [{k: v for k, v in found.items() if not k.startswith("served ")} for found in stores(results)]


def draw_store(found: Sequence[Mapping[str, AccuracyRecord]], path: Path) -> None:
    """Time to the first token against the length of the prompt."""
    import matplotlib.pyplot as plt

    size = (6 * len(found) + 1, 4.5)
    figure, panels = plt.subplots(1, len(found), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, lines in zip(panels[0], found, strict=True):
        for place, (name, line) in enumerate((n, x) for n, x in lines.items() if "+" not in n):
            style = {"color": f"C{place % 10}", "marker": "o" if place < 10 else "s"}
            label = "prefill" if name == NO_STORE else name
            axes.plot(line.case["lengths"], line.metrics["ttft_s"], label=label, **style)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("seconds to the first token")
        axes.legend(loc="upper left", ncols=3, fontsize="small")
        axes.set_title(lines[NO_STORE].case["model"])
    panels[0][0].set_ylim(top=40 * panels[0][0].get_ylim()[1] / 10)  # room for the legend
    line = found[0][NO_STORE]
    save(figure, found, path, f"{line.device.split(',')[0]}, {line.utc[:10]}")


TABLES: dict[str, Callable[[Path], str]] = {
    "tuning": frontier_table,
    "tuning_questions": questions_table,
    "tuning_sides": sides_table,
    "store": store_table,
    "store_scores": store_scores_table,
    "store_steps": store_steps_table,
}
PLOTS = {"tuning": (tuning_plot_data, draw_tuning), "store": (store_plot_data, draw_store)}

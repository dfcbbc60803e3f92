"""`python -m benchmarks.accuracy tune`: what `vllm-int8kv tune` finds, and what of KVTuner (arXiv 2502.04420) holds.

One line per question, each with the points that answer it. The measurements go through one journal, so that later
questions cost what is new in them.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.texts import texts
from vllm_int8kv.commands.models import resolve
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.eval_plan import make_plan
from vllm_int8kv.evaluation.tuning.plan import TunePlan
from vllm_int8kv.evaluation.tuning.policies import Limit
from vllm_int8kv.evaluation.tuning.report import picked, print_tuning, write_policy
from vllm_int8kv.evaluation.tuning.tune import tune

KVTUNER_PAIRS = tuple(f"k{k}v{v}" for k in (8, 4, 2) for v in (8, 4, 2))
FRONTIER = "frontier"
QUESTIONS: dict[str, dict[str, Any]] = {
    FRONTIER: {},
    "5.0 bits": {"limit": Limit("--max-bits", 5.0)},
    "4.6 bits": {"limit": Limit("--max-bits", 4.6)},
    "5.0 bits, pairs of KVTuner": {"limit": Limit("--max-bits", 5.0), "pairs": KVTUNER_PAIRS},
    "5.0 bits, nsga2": {"limit": Limit("--max-bits", 5.0), "search": "nsga2"},
}
"""What of a `TunePlan` differs."""
STABLE_BITS = 5.0
"""The limit under which single texts choose."""
STABLE = f"{STABLE_BITS:.1f} bits, chosen by single texts"


def tune_model(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="of each text; the first half for the search")] = 1024,
    work: Annotated[Path | None, typer.Option(help="folder of the journals, to go on from when interrupted")] = None,
    only: Annotated[list[str] | None, typer.Option(help="a question by its name; all by default")] = None,
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Tune the bits of every layer, with all pairs, with those of KVTuner, with its search, and by single texts."""
    if unknown := set(only or ()) - {*QUESTIONS, STABLE}:
        raise typer.BadParameter(f"expected of {', '.join([*QUESTIONS, STABLE])}, got {', '.join(sorted(unknown))}")
    asked = only or [*QUESTIONS, STABLE]
    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    console = Console(stderr=True)
    chosen = texts()
    plan = TunePlan(_eval_plan(model, tokens, chosen))
    case = {"model": model, "dtype": "float32", "tokens": tokens, "texts": list(chosen)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        journal = folder / "journal.jsonl"
        for question, options in QUESTIONS.items():
            if question not in asked:
                continue
            report = tune(replace(plan, journal=journal, **options), console, name=model)
            print_tuning(report, console)
            metrics = summary_of(report)
            if question != FRONTIER:  # they would be the same
                metrics.pop("layers")
            accuracy_record.append("tuning", case, question, metrics, out)
        if STABLE in asked:
            metrics = stability(model, tokens, chosen, folder, console)
            accuracy_record.append("tuning", case, STABLE, metrics, out)


def _eval_plan(model: str, tokens: int, chosen: Mapping[str, str]) -> Any:
    plan = make_plan(
        [],
        paths="prefill",
        needle_lengths="",
        engine_options="{}",
        model=str(resolve(model)),
        max_tokens=tokens,
        dtype="float32",
        generate_tokens=0,
    )
    return replace(plan, texts=tuple(chosen.values()), text_names=tuple(chosen))


def stability(model: str, tokens: int, chosen: Mapping[str, str], folder: Path, console: Console) -> dict[str, Any]:
    """What single texts choose, and what that is worth on all of them."""
    names = list(chosen)[:3]
    files, picks = [], {}
    for name in names:
        plan = TunePlan(_eval_plan(model, tokens, {name: chosen[name]}), limit=Limit("--max-bits", STABLE_BITS))
        report = tune(replace(plan, journal=folder / f"{name}.jsonl"), console, name=f"{model}, {name}")
        picks[name] = picked(report)["policy"]
        files.append(folder / f"{name}.yaml")
        write_policy(report, files[-1])
    plan = TunePlan(_eval_plan(model, tokens, chosen), policies=tuple(files), journal=folder / "journal.jsonl")
    metrics = summary_of(tune(plan, console, name=model))
    for point in metrics["points"]:
        if point["kind"] == "file":
            point["name"] = Path(point["name"]).stem
    return {"points": metrics["points"], "same_choice": agreement(list(picks.values()))}


def agreement(policies: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """How much policies agree: the share of layers with the same pair, and bits by which K and V differ, means over
    all pairs of policies."""
    same, bits = [], []
    for index, one in enumerate(policies):
        for other in policies[:index]:
            same += [one[layer] == other[layer] for layer in one]
            bits += [abs(int(one[layer][side]) - int(other[layer][side])) for layer in one for side in (1, 3)]
    return {"pairs": sum(same) / len(same), "bits": sum(bits) / len(bits)}


def summary_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report of `tune` what the tables need."""
    kept = ("layers", "pair_checks", "groups", "pick", "text_tokens")
    points = []
    for point in report["points"]:
        held_out = point["held_out"]
        points.append(
            {
                **{name: point[name] for name in ("name", "kind", "bits", "bits_with_scales", "tokens_ratio")},
                "policy": " ".join(point["policy"].values()),
                "predicted_kl": point["predicted_kl"],
                "kl": point["search"]["kl_per_token"]["value"],
                "held_out_kl": held_out["kl_per_token"],
                "held_out_kl_p999": held_out["kl_p999"],
                "held_out_perplexity_change": held_out["perplexity_change"],
            }
        )
    return {name: report[name] for name in kept if name in report} | {"points": points}

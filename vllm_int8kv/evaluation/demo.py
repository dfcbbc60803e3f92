"""`vllm-int8kv demo`: one model with an unquantized KV cache, an INT8 one and one of fewer bits, measured side by side.

Engines run one after the other, each in a process of its own (`demo_engine.py`). One per cache, with the model's own
dtype, answers the prompts, counts the tokens that fit into the same memory and decodes at a long context. One per
cache in fp32 scores a text. Those are apart because bf16 arithmetic hides the cache: two bf16 engines that only round
in another order (`enforce_eager` or not) differ by a KL of 1.3e-3 per token, several times what INT8 costs.

CPUs that compute bf16 in software take six times as long for it as for fp32 (11 against 61 GFLOPS for [2048, 576] x
[576, 1536] on two AVX2 cores): there one engine per cache does everything in fp32. The contexts of the speed test are
as long as their prefill has time for.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines.process import run_engine
from vllm_int8kv.evaluation.machine import has_fast_bf16
from vllm_int8kv.evaluation.progress import ProgressDisplay
from vllm_int8kv.evaluation.scoring import load_scores, summarize

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "How many days are in a week? Answer in one sentence.",
    "Name the first four months of the year.",
    "Why is the sky blue?",
)
TEXT = Path(__file__).with_name("data") / "demo.txt"
DTYPES = (
    CacheSpec("auto", "auto"),
    CacheSpec(KV_CACHE_DTYPE, KV_CACHE_DTYPE),
    CacheSpec(f"{KV_CACHE_DTYPE}:format=k6v4", KV_CACHE_DTYPE, int8_kv={"format": "k6v4"}),
)
"""The caches; the others are compared with the first."""
RATIOS = {"kv_cache_tokens": "capacity_ratio", "decode_tok_per_s": "decode_ratio"}
"""Numbers of which more is better, and what the report calls them as times those of the first cache."""
STAGE_SECONDS = {"load": 20, "answer": 3, "text": 15, "decode": 75}
"""Shares of a progress bar, roughly what they take on two cores."""


@dataclass(frozen=True)
class DemoPlan:
    """What one engine does. Stages with nothing to do are left out."""

    model: str
    """Path or name as vLLM takes it."""
    kv_cache_dtype: str = "auto"
    """With its options, as `CacheSpec.parse` reads it."""
    dtype: str = "auto"
    prompts: tuple[str, ...] = ()
    answer_tokens: int = 40
    text: str = ""
    """Scored token by token into the files of a `scoring.TextFiles`."""
    scores_path: str = ""
    reference_path: str = ""
    is_reference: bool = False
    num_seqs: int = 8
    """Sequences that decode together, in the text as in the speed test."""
    context_len: int = 4096
    """Of the sequences of the speed test, and what the cache has room for."""
    decode_context_len: int = 0
    """What the speed test takes of it; 0: as much as `prefill_seconds` allow."""
    prefill_seconds: float = 50.0
    """By the time of a short prompt; the tokens of long ones take longer, as attention does."""
    decode_steps: int = 24
    """Timed steps of the speed test; 0 leaves it out."""

    def stages(self) -> dict[str, int]:
        """The stages in order and their shares of the progress bar."""
        wanted = {"load": True, "answer": self.prompts, "text": self.text, "decode": self.decode_steps}
        return {stage: seconds for stage, seconds in STAGE_SECONDS.items() if wanted[stage]}


def run_demo(plan: DemoPlan, console: Console, *, name: str, verbose: bool = False) -> dict[str, Any]:
    """Run the engines.

    Args:
        plan: model and sizes; the rest of it is filled in here. An empty `text` means the one that comes with
            the package.
        name: what the report calls the model.
        verbose: show the logs of vLLM on stderr instead of progress bars.

    Returns:
        The report that `--json` writes.

    Raises:
        EngineError: an engine failed.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-int8kv-") as folder:
        plans = make_plans(plan, folder)
        with ProgressDisplay(console, is_hidden=verbose) as progress:
            results = _run_engines(plans, progress, verbose)
        scores = [load_scores([plan.scores_path]) for plan in plans if plan.text]
    return _report(name, plans[0].prompts, results[: len(DTYPES)], [summarize(text, scores[0]) for text in scores])


def make_plans(plan: DemoPlan, folder: str) -> list[DemoPlan]:
    """What each engine does, those with the answers and the speed first; scores go to files of a folder."""
    if plan.dtype == "auto" and not has_fast_bf16():
        plan = replace(plan, dtype="float32")
    plan = replace(plan, prompts=plan.prompts or PROMPTS, text=plan.text or TEXT.read_text())
    everything = [
        replace(
            plan,
            kv_cache_dtype=cache.name,
            scores_path=str(Path(folder, f"{index}.npy")),
            reference_path=str(Path(folder, "reference.npy")),
            is_reference=index == 0,
        )
        for index, cache in enumerate(DTYPES)
    ]
    if plan.dtype == "float32":
        return everything
    speed = [replace(plan, text="") for plan in everything]
    return speed + [replace(plan, dtype="float32", prompts=(), decode_steps=0) for plan in everything]


def _run_engines(plans: list[DemoPlan], progress: ProgressDisplay, verbose: bool) -> list[dict[str, Any]]:
    engines = []
    for plan in plans:
        name = plan.kv_cache_dtype if plan.prompts else f"{plan.kv_cache_dtype} in {plan.dtype}"
        engines.append(progress.engine(name, plan.stages()))
    results = []
    for plan, engine in zip(plans, engines, strict=True):
        if results and plan.decode_steps:
            plan = replace(plan, decode_context_len=results[0]["context_len"])  # as the engine before
        with engine as stages:
            results.append(
                run_engine("vllm_int8kv.evaluation.engines.demo_engine", asdict(plan), stages.update, verbose)
            )
    return results


def _report(
    name: str, prompts: tuple[str, ...], results: list[dict[str, Any]], scores: list[dict[str, Any]]
) -> dict[str, Any]:
    """The report, from what the engine of each cache found and the summary of its scores."""

    def per_cache(values: Iterable[Any]) -> dict[str, Any]:
        return {cache.name: value for cache, value in zip(DTYPES, values, strict=True)}

    answers = zip(*(result["answers"] for result in results), strict=True)
    rows = [{"prompt": prompt, "answers": per_cache(row)} for prompt, row in zip(prompts, answers, strict=True)]
    report = {"model": name, "prompts": rows}
    for key, ratio in RATIOS.items():
        report[key] = per_cache(result[key] for result in results)
        report[ratio] = per_cache(result[key] / results[0][key] for result in results)
    for key in ("kl_per_token", "top1_agreement"):
        report[key] = per_cache(score[key]["value"] for score in scores)
    report["text_tokens"] = scores[0]["num_tokens"]
    for key in ("dtype", "kv_cache_memory_bytes", "num_seqs", "context_len", "num_threads"):
        report[key] = results[0][key]
    return report


def print_demo(report: dict[str, Any], console: Console) -> None:
    """Show a report of `run_demo`."""
    first, *others = report["kv_cache_tokens"]
    answers = Table("KV cache", "answer", title="Answers")
    answers.columns[0].no_wrap = True
    for row in report["prompts"]:
        expected = row["answers"][first]
        answers.add_row("", Text(row["prompt"], style="bold"))
        answers.add_row(first, Text(expected))
        for cache in others:
            answer = row["answers"][cache]
            answers.add_row(cache, Text("the same", style="dim") if answer == expected else Text(answer))
        answers.add_section()
    console.print(answers)
    table = Table("", first, *others, title=report["model"])
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True

    def add_row(what: str, key: str, number: str) -> None:
        ratios = report[RATIOS[key]]
        cells = (f"{report[key][cache]:{number}} ({ratios[cache]:.2f}x)" for cache in others)
        table.add_row(what, f"{report[key][first]:{number}}", *cells)

    add_row(f"tokens in {report['kv_cache_memory_bytes'] / 2**20:,.0f} MiB of cache", "kv_cache_tokens", ",")
    context = f"{report['num_seqs']} x {report['context_len']:,} tokens"
    add_row(f"decode tokens/s at {context}", "decode_tok_per_s", ",.1f")
    divergences, agreements = report["kl_per_token"], report["top1_agreement"]
    table.add_row("KL divergence per token (nats)", "0", *(f"{divergences[cache]:.1e}" for cache in others))
    table.add_row("same most likely token", "100 %", *(f"{agreements[cache]:.1%}" for cache in others))
    console.print(table)
    if report["dtype"] == "float32" and not has_fast_bf16():
        console.print(
            f"Weights, arithmetic and the cache `{first}` in fp32: this CPU computes bf16 in software.", style="dim"
        )
    console.print(
        f"KL and top-1: {report['text_tokens']:,} tokens decoded one by one in fp32, over the whole vocabulary. "
        f"Speed: median step, {report['num_threads']} threads. Long answers may part where two words are about equally "
        "likely, as they do between any two engines that round differently.",
        style="dim",
    )

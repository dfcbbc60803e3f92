"""`vllm-int8kv demo`: one model with an unquantized and with an INT8 KV cache, measured side by side.

Engines run one after the other, each in a process of its own (`demo_engine.py`). Two with the model's own dtype
answer the prompts, count the tokens that fit into the same memory and decode at a long context. Two in fp32 score a
text. Those are apart because bf16 arithmetic hides the cache: two bf16 engines that only round in another order
(`enforce_eager` or not) differ by a KL of 1.3e-3 per token, several times what INT8 costs.

CPUs that compute bf16 in software take six times as long for it as for fp32 (11 against 61 GFLOPS for [2048, 576] x
[576, 1536] on two AVX2 cores): there two engines do everything in fp32. The contexts of the speed test are as long as
their prefill has time for.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_int8kv.config import KV_CACHE_DTYPE
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
DTYPES = ("auto", KV_CACHE_DTYPE)
STAGE_SECONDS = {"load": 20, "answer": 3, "text": 15, "decode": 75}
"""Shares of a progress bar, roughly what they take on two cores."""


@dataclass(frozen=True)
class DemoPlan:
    """What one engine does. Stages with nothing to do are left out."""

    model: str
    """Path or name as vLLM takes it."""
    kv_cache_dtype: str = "auto"
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
        auto_scores, int8_scores = (load_scores([plan.scores_path]) for plan in plans if plan.text)
    return _report(name, plans[0].prompts, results, summarize(int8_scores, auto_scores))


def make_plans(plan: DemoPlan, folder: str) -> list[DemoPlan]:
    """What each engine does, those with the answers and the speed first; scores go to files of a folder."""
    if plan.dtype == "auto" and not has_fast_bf16():
        plan = replace(plan, dtype="float32")
    plan = replace(plan, prompts=plan.prompts or PROMPTS, text=plan.text or TEXT.read_text())
    everything = [
        replace(
            plan,
            kv_cache_dtype=dtype,
            scores_path=str(Path(folder, f"{dtype}.npy")),
            reference_path=str(Path(folder, "reference.npy")),
            is_reference=dtype == "auto",
        )
        for dtype in DTYPES
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
    name: str, prompts: tuple[str, ...], results: list[dict[str, Any]], text_scores: dict[str, Any]
) -> dict[str, Any]:
    auto, int8, *_ = results
    answers = zip(prompts, auto["answers"], int8["answers"], strict=True)
    report = {"model": name, "prompts": [dict(zip(("prompt", *DTYPES), answer, strict=True)) for answer in answers]}
    for key in ("kv_cache_tokens", "decode_tok_per_s"):
        report[key] = {"auto": auto[key], KV_CACHE_DTYPE: int8[key]}
    report["capacity_ratio"] = int8["kv_cache_tokens"] / auto["kv_cache_tokens"]
    for key in ("kl_per_token", "top1_agreement"):
        report[key] = text_scores[key]["value"]
    report["text_tokens"] = text_scores["num_tokens"]
    for key in ("dtype", "kv_cache_memory_bytes", "num_seqs", "context_len", "num_threads"):
        report[key] = int8[key]
    return report

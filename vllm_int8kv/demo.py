"""`vllm-int8kv demo`: one model with an unquantized and with an INT8 KV cache, measured side by side.

Four engines run one after the other, each in a process of its own (`demo_engine.py`). Two with the model's own
dtype answer the prompts, count the tokens that fit into the same memory and decode at a long context. Two in
fp32 score a text. Those are apart because bf16 arithmetic hides the cache: two bf16 engines that only round in
another order (`enforce_eager` or not) differ by a KL of 1.3e-3 per token, several times what INT8 costs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from vllm_int8kv.config import KV_CACHE_DTYPE

PROMPTS = (
    "What is the capital of France? Answer in one sentence.",
    "How many days are in a week? Answer in one sentence.",
    "Name the first four months of the year.",
    "Why is the sky blue?",
)
TEXT = Path(__file__).with_name("data") / "demo.txt"
DTYPES = ("auto", KV_CACHE_DTYPE)
EVENT = "@vllm-int8kv-demo "
STAGE_SECONDS = {"load": 20, "answer": 3, "text": 15, "decode": 45}
"""Shares of a progress bar, roughly what they take on two cores."""
KEPT_LOG_LINES = 40


class EngineError(RuntimeError):
    """An engine of the demo failed; the message ends with its last words."""


@dataclass(frozen=True)
class Plan:
    """What one engine does. Stages with nothing to do are left out."""

    model: str
    """Path or name as vLLM takes it."""
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    prompts: tuple[str, ...] = ()
    answer_tokens: int = 40
    text: str = ""
    """Scored token by token into the .npy file `log_probs_path`."""
    log_probs_path: str = ""
    num_seqs: int = 8
    """Sequences that decode together, in the text as in the speed test."""
    context_len: int = 4096
    decode_steps: int = 24
    """Timed steps of the speed test; 0 leaves it out."""

    def stages(self) -> dict[str, int]:
        """The stages in order and their shares of the progress bar."""
        wanted = {"load": True, "answer": self.prompts, "text": self.text, "decode": self.decode_steps}
        return {stage: seconds for stage, seconds in STAGE_SECONDS.items() if wanted[stage]}


def run_demo(plan: Plan, console: Console, *, name: str, verbose: bool = False) -> dict[str, Any]:
    """Run the four engines.

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
        plans, text = [], plan.text or TEXT.read_text()
        for dtype in DTYPES:
            plans.append(replace(plan, kv_cache_dtype=dtype, prompts=plan.prompts or PROMPTS, text=""))
        for dtype in DTYPES:
            path = str(Path(folder, f"{dtype}.npy"))
            plans.append(
                replace(plan, kv_cache_dtype=dtype, dtype="float32", text=text, log_probs_path=path, decode_steps=0)
            )
        columns = TextColumn("{task.description:<30}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console, disable=verbose) as progress:
            results = _run_engines(plans, progress, verbose)
        text_scores = compare_log_probs(plans[2].log_probs_path, plans[3].log_probs_path)
    return _report(name, plans[0].prompts, results, text_scores)


def _run_engines(plans: list[Plan], progress: Progress, verbose: bool) -> list[dict[str, Any]]:
    task_ids = []
    for plan in plans:
        what = "text in fp32" if plan.text else "answers, speed"
        total = sum(plan.stages().values())
        task_ids.append(progress.add_task(f"{plan.kv_cache_dtype}: {what}", total=total, start=False))
    results = []
    for plan, task_id in zip(plans, task_ids, strict=True):
        progress.start_task(task_id)

        def show(done: float, task_id: TaskID = task_id) -> None:
            progress.update(task_id, completed=done)

        results.append(run_engine(plan, show, verbose))
        progress.stop_task(task_id)
    return results


def run_engine(plan: Plan, on_progress: Callable[[float], None], verbose: bool = False) -> dict[str, Any]:
    """Carry out a plan in a process of its own.

    Args:
        on_progress: called with what is done, in units of `Plan.stages`.
        verbose: pass the log of vLLM on to stderr.

    Returns:
        The result of `demo_engine.main`.

    Raises:
        EngineError: the process ended without a result.
    """
    environment = {
        # The engine in the process itself: a third of the start-up time, and every core computes (vLLM's worker
        # processes keep one core free for the scheduler, which is half of a machine with two).
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
    }
    command = [sys.executable, "-m", "vllm_int8kv.demo_engine", json.dumps(asdict(plan))]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    result, log = None, deque(maxlen=KEPT_LOG_LINES)
    with subprocess.Popen(command, env=os.environ | environment, **output) as process:
        try:
            for line in process.stdout:
                if line.startswith(EVENT):
                    event = json.loads(line.removeprefix(EVENT))
                    result = event.get("result")
                    on_progress(_completed(plan, **event))
                else:
                    log.append(line)
                    if verbose:
                        sys.stderr.write(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0 or result is None:
        raise EngineError(
            f"the engine with kv_cache_dtype={plan.kv_cache_dtype!r} and dtype={plan.dtype!r} ended with exit code "
            f"{process.returncode}. Its last lines:\n{''.join(log)}"
        )
    return result


def _completed(plan: Plan, stage: str | None = None, done: float = 1.0, result: object = None) -> float:
    """Progress in units of `Plan.stages` after an event of the engine."""
    stages = plan.stages()
    if stage is None:
        return sum(stages.values())
    before = list(stages)[: list(stages).index(stage)]
    return sum(stages[name] for name in before) + done * stages[stage]


def compare_log_probs(reference_path: str, path: str) -> dict[str, Any]:
    """Compare two .npy files `[num_tokens, vocab_size]` of log-probabilities.

    Returns:
        kl_per_token: mean over the tokens of KL(reference || other) in nats, over the whole vocabulary, in fp64;
        top1_agreement: share of tokens for which both find the same token most likely; text_tokens: their number.

    Raises:
        EngineError: a row is no distribution, as when an engine left it out.
    """
    reference, other = np.load(reference_path, mmap_mode="r"), np.load(path, mmap_mode="r")
    kl, agreement = 0.0, 0
    for begin in range(0, len(reference), 64):
        p, q = (rows[begin : begin + 64].astype(np.float64) for rows in (reference, other))
        sums = np.exp((p, q)).sum(axis=-1)
        if not np.allclose(sums, 1, atol=1e-3):
            rows = f"tokens {begin} to {begin + len(p) - 1}"
            raise EngineError(f"{rows}: probabilities sum up to {sums.min():.3g} to {sums.max():.3g}, not 1")
        kl += float((np.exp(p) * (p - q)).sum())
        agreement += int((p.argmax(axis=-1) == q.argmax(axis=-1)).sum())
    count = len(reference)
    return {"kl_per_token": kl / count, "top1_agreement": agreement / count, "text_tokens": count}


def _report(
    name: str, prompts: tuple[str, ...], results: list[dict[str, Any]], text_scores: dict[str, Any]
) -> dict[str, Any]:
    auto, int8, *_ = results
    answers = zip(prompts, auto["answers"], int8["answers"], strict=True)
    report = {"model": name, "prompts": [dict(zip(("prompt", *DTYPES), answer, strict=True)) for answer in answers]}
    for key in ("kv_cache_tokens", "decode_tok_per_s"):
        report[key] = {"auto": auto[key], KV_CACHE_DTYPE: int8[key]}
    report["capacity_ratio"] = int8["kv_cache_tokens"] / auto["kv_cache_tokens"]
    report |= text_scores
    return report | {key: int8[key] for key in ("kv_cache_memory_bytes", "num_seqs", "context_len", "num_threads")}

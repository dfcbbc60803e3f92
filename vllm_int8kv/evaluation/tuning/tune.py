"""`vllm-int8kv tune`: which bits for which layer.

KVTuner (arXiv 2502.04420) in five steps: what every layer loses to every number of bits, K and V apart; the pairs of
bits that are worth choosing; layers that behave alike; the search; and the truth about what it found. One engine
measures (`engines/tuning_engine.py`). It sees one half of the texts until the last step, which takes the other half.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.engines.process import EngineProcess
from vllm_int8kv.evaluation.progress import ProgressDisplay, say
from vllm_int8kv.evaluation.tuning.journal import Journal, Measurements
from vllm_int8kv.evaluation.tuning.plan import TunePlan
from vllm_int8kv.evaluation.tuning.run import TuneRun

ENGINE = "vllm_int8kv.evaluation.engines.tuning_engine"
STAGE_SECONDS = {"load": 15, "sample": 60, "exact": 10, "errors": 15, "layers": 400, "pairs": 20, "search": 20}
STAGE_SECONDS |= {"verify": 60}
"""Shares of a progress bar, roughly what they take on two cores."""


def tune(plan: TunePlan, console: Console, *, name: str, verbose: bool = False) -> dict[str, Any]:
    """Find a policy, or evaluate some.

    Args:
        name: what the report calls the model.
        verbose: show the log of vLLM on stderr instead of a progress bar.

    Returns:
        The report that `--json` writes: the model, `layers` with their divergences by bits and their errors, the
        `pairs` that were checked, `groups` of layers, `points`, the fields of each `Point`, and the name of the `pick`.

    Raises:
        EngineError: the engine failed.
        ValueError: a limit cannot be met, a policy file cannot be followed, a text is too short, or the journal is of
            another run.
    """
    journal = Journal(plan.journal, plan.header())
    has_texts = bool(plan.eval_plan.texts) or journal.has("token_ids")
    shares = {stage: seconds for stage, seconds in STAGE_SECONDS.items() if not (stage == "sample" and has_texts)}
    with (
        contextlib.closing(journal),
        ProgressDisplay(console, verbose) as progress,
        progress.engine("tune", shares) as stages,
        EngineProcess(ENGINE, "the engine of tune", stages.update, verbose) as engine,
    ):
        own = replace(plan.eval_plan, kv_cache_dtype=KV_CACHE_DTYPE)
        if journal.has("token_ids"):
            own = replace(own, token_ids=journal.answer("token_ids", list))
        model = engine.ask(asdict(own))
        journal.answer("token_ids", lambda: model["token_ids"])
        _check_perplexity(journal.answer("perplexity", lambda: model["perplexity"]), model, plan.journal)
        run = TuneRun(plan, model, Measurements(engine.ask, journal), stages)
        run.say_cost(partial(say, console))
        report = run.evaluate() if plan.policies else run.tune()
    texts = [f"text {index}" for index in range(len(model["token_ids"]))]
    return {
        "model": name,
        "dtype": model["dtype"],
        "text_source": "files" if plan.eval_plan.texts else "samples of the model",
        "text_tokens": dict(zip(texts, map(len, model["token_ids"]), strict=True)),
        **report,
    }


def _check_perplexity(before: Mapping[str, float], model: Mapping[str, Any], journal: Path | None) -> None:
    """Raise ValueError if the exact model is another one than when the journal was begun."""
    for half, perplexity in model["perplexity"].items():
        if not np.isclose(perplexity, before[half], rtol=1e-3):
            raise ValueError(
                f"--journal: {journal} is of another run: the perplexity of the exact model was {before[half]:.4f} "
                f"and is {perplexity:.4f}, so its weights have changed; give --fresh to start anew"
            )

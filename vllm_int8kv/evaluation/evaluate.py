"""`vllm-int8kv eval`: what each KV cache dtype costs in accuracy, measured through vLLM itself.

Texts are scored token by token (teacher forcing). The reference is `auto` by decode steps; every other cache, and
`auto` on the other read paths, which shows the noise of the arithmetic, is compared with it over the whole
vocabulary. Engines run one after the other, each in a process of its own (`eval_engine.py`). On CPU they compute in
fp32 unless told otherwise: two bf16 engines that only round in another order differ by a KL of 1.3e-3 per token,
several times what INT8 costs.
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from rich.console import Console

from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines.process import EngineError, run_engine
from vllm_int8kv.evaluation.eval_plan import PATHS, REFERENCE, EvalPlan, scores_path
from vllm_int8kv.evaluation.progress import ProgressDisplay
from vllm_int8kv.evaluation.scoring import LOG_PROB, every, load_scores, summarize


def evaluate(
    plan: EvalPlan,
    caches: Sequence[CacheSpec],
    console: Console,
    *,
    name: str,
    optional: Collection[str] = (),
    verbose: bool = False,
) -> dict[str, Any]:
    """Compare KV cache dtypes.

    Args:
        plan: model, texts and sizes; the rest of it is filled in here.
        caches: what to compare with `auto`.
        name: what the report calls the model.
        optional: names of caches that are left out where their engine fails; vLLM has no fp8 cache on CPUs without
            AVX-512, for example.
        verbose: show the logs of vLLM on stderr instead of progress bars.

    Returns:
        The report that `--json` writes; `caches` maps the name of each `CacheSpec`, `auto` first, to its results,
        `left_out` the others to what their engine said last.

    Raises:
        EngineError: an engine failed that is not optional.
        ValueError: a text is too short to be scored.
    """
    caches = [CacheSpec(REFERENCE, REFERENCE), *(cache for cache in caches if cache.name != REFERENCE)]
    progress = ProgressDisplay(console, is_hidden=verbose)
    with tempfile.TemporaryDirectory(prefix="vllm-int8kv-") as folder, progress:
        results: dict[str, dict[str, Any]] = {}
        left_out: dict[str, str] = {}
        plan = replace(plan, folder=folder)
        for index, cache in enumerate(caches):
            own = replace(
                plan,
                kv_cache_dtype=cache.kv_cache_dtype,
                int8_kv=cache.int8_kv,
                engine_options=plan.engine_options | cache.engine_options,
                label=str(index),
            )
            try:
                results[cache.name] = _run_cache(
                    own, cache.name, is_reference=index == 0, progress=progress, verbose=verbose
                )
            except EngineError as error:
                if cache.name not in optional:
                    raise
                left_out[cache.name] = error.last_line
            plan = replace(plan, token_ids=results[REFERENCE]["token_ids"])
        reference = _load(plan, "0", "decode")
        measured = {}
        for index, cache in enumerate(caches):
            if result := results.get(cache.name):
                measured[cache.name] = _measure(plan, str(index), result, results[REFERENCE], reference)
    head = {key: results[REFERENCE][key] for key in ("dtype", "device", "vllm", "block_size")}
    texts = [f"text {index}" for index in range(len(plan.token_ids))]
    return {
        "model": name,
        **head,
        "text_source": "files" if plan.texts else "samples of the model",
        "text_tokens": dict(zip(texts, map(len, plan.token_ids), strict=True)),
        "chunk_tokens": plan.chunk_tokens,
        "prefix_stride": plan.prefix_stride,
        "caches": measured,
        "left_out": left_out,
    }


def _run_cache(
    plan: EvalPlan, name: str, is_reference: bool, progress: ProgressDisplay, verbose: bool
) -> dict[str, Any]:
    """Run the engine of one cache."""
    wanted = {"decode", *plan.paths} if is_reference else plan.paths
    plan = replace(plan, paths=tuple(path for path in PATHS if path in wanted), is_reference=is_reference)
    with progress.engine(name, plan.stages()) as stages:
        return run_engine("vllm_int8kv.evaluation.engines.eval_engine", asdict(plan), stages.update, verbose)


def _load(plan: EvalPlan, label: str, path: str) -> list[np.ndarray]:
    files = [scores_path(plan, label, path, text) for text in range(len(plan.token_ids))]
    try:
        return load_scores(files, plan.strides(path))
    except ValueError as error:
        raise EngineError(f"{label}, {path}: {error}") from error


def _measure(
    plan: EvalPlan, label: str, result: Mapping[str, Any], baseline: Mapping[str, Any], reference: list[np.ndarray]
) -> dict[str, Any]:
    """The results of one cache."""
    paths, own_decode = {}, None
    for path in ("decode", *(path for path in PATHS if path != "decode")):
        if path not in plan.paths and not (label == "0" and path == "decode"):
            continue
        scores, strides = _load(plan, label, path), plan.strides(path)
        paths[path] = summarize(scores, every(reference, strides))
        if path == "decode":
            own_decode = scores
        elif own_decode is not None:
            same = every(own_decode, strides)
            differences = np.concatenate([a[:, LOG_PROB] - b[:, LOG_PROB] for a, b in zip(scores, same, strict=True)])
            paths[path]["log_prob_difference_from_decode"] = {
                "mean_abs": float(np.abs(differences).mean()),
                "max_abs": float(np.abs(differences).max()),
            }
    measured = {"paths": paths, "kv_cache_tokens": result["kv_cache_tokens"]}
    if "prefix_hit_share" in result:
        paths["prefix"]["prefix_hit_share"] = result["prefix_hit_share"]
    if "answers" in result:
        measured["first_divergence"] = first_divergence(baseline["answers"], result["answers"])
    if "needle" in result:
        measured["needle"] = result["needle"]
    return measured


def first_divergence(expected: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Where greedy answers leave the ones of the reference.

    Returns:
        positions, per answer the index of the first other token or None; same, the share of equal answers;
        mean_tokens, the mean number of equal tokens at the start, which is at most `max_tokens`.
    """
    positions: list[int | None] = []
    for want, got in zip(expected, answers, strict=True):
        others = [index for index, (a, b) in enumerate(zip(want, got, strict=True)) if a != b]
        positions.append(others[0] if others else None)
    max_tokens = len(expected[0])
    kept = [max_tokens if position is None else position for position in positions]
    return {
        "positions": positions,
        "same": sum(position is None for position in positions) / len(positions),
        "mean_tokens": float(np.mean(kept)),
        "max_tokens": max_tokens,
    }

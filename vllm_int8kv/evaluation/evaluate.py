"""`vllm-int8kv eval`: what each KV cache dtype costs in accuracy, measured through vLLM itself.

Texts are scored token by token (teacher forcing). The reference is `auto` by decode steps; every other cache, and
`auto` on the other read paths, which shows the noise of the arithmetic, is compared with it over the whole
vocabulary. Engines run one after the other, each in a process of its own (`eval_engine.py`). On CPU they compute in
fp32 unless told otherwise: two bf16 engines that only round in another order differ by a KL of 1.3e-3 per token,
several times what INT8 costs.
"""

import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_int8kv.config import KV_CACHE_DTYPE, Int8KVConfig
from vllm_int8kv.evaluation.engines.process import EngineError, run_engine
from vllm_int8kv.evaluation.scoring import LOG_PROB, load_scores, summarize

REFERENCE = "auto"
PATHS = ("decode", "prefill", "chunked", "prefix")
"""How the scored tokens read the context: by decode steps; by prefill in one step; by prefill in chunks, of which
all but the first read what earlier ones stored; by prefill after a prefix-cache hit."""
STAGE_SECONDS = {"load": 15, "sample": 60, "decode": 30, "prefill": 10, "chunked": 10, "prefix": 20, "generate": 15}
STAGE_SECONDS |= {"needle": 30}
"""Shares of a progress bar, roughly what they take on two cores."""


@dataclass(frozen=True)
class CacheSpec:
    """One column of the comparison: a KV cache dtype and options."""

    name: str
    kv_cache_dtype: str
    int8_kv: dict[str, Any] = field(default_factory=dict)
    """Options of this plugin, for its own dtype."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of `LLM`, for other dtypes."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `DTYPE` or `DTYPE:OPTION=VALUE:...`.

        `int8_custom:rotate_keys=false` sets an option of this plugin, `fp8:calculate_kv_scales=true` an argument of
        vLLM's `LLM`.

        Raises:
            ValueError: an option has no value, or this plugin's is unknown or has the wrong type.
        """
        kv_cache_dtype, *options = text.split(":")
        chosen = {}
        for option in options:
            name, separator, value = option.partition("=")
            if not separator:
                raise ValueError(f"--dtypes: expected OPTION=VALUE after {kv_cache_dtype}:, got {option!r}")
            chosen[name] = yaml.safe_load(value)
        if kv_cache_dtype != KV_CACHE_DTYPE:
            return cls(text, kv_cache_dtype, engine_options=chosen)
        Int8KVConfig.from_mapping(chosen)
        return cls(text, kv_cache_dtype, int8_kv=chosen)


@dataclass(frozen=True)
class EvalPlan:
    """What one engine does."""

    model: str
    """Path or name as vLLM takes it."""
    kv_cache_dtype: str = REFERENCE
    int8_kv: dict[str, Any] = field(default_factory=dict)
    """Options of this plugin."""
    dtype: str = "auto"
    """Of weights and arithmetic; auto is fp32 on CPU and the model's own elsewhere."""
    engine_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of `LLM`."""
    texts: tuple[str, ...] = ()
    """What to score; without any, `num_samples` texts that the model itself writes."""
    num_samples: int = 3
    max_tokens: int = 1024
    """Longer texts are cut."""
    token_ids: list[list[int]] = field(default_factory=list)
    """The texts as an earlier engine tokenized or wrote them."""
    paths: tuple[str, ...] = PATHS
    num_parts: int = 8
    """Parts of a text that decode side by side."""
    chunk_tokens: int = 256
    """Size of a chunk of the path chunked."""
    prefix_stride: int = 16
    """The path prefix scores every `prefix_stride`-th token."""
    generate_tokens: int = 128
    """Length of the greedy answers compared; 0 leaves them out."""
    needle_lengths: tuple[int, ...] = (512, 1024, 2048)
    """Contexts in which a number is hidden; longer ones than the model has are left out."""
    folder: str = ""
    """Where the scores go."""
    label: str = ""
    """Of this engine's files."""
    is_reference: bool = False

    def stages(self) -> dict[str, int]:
        """The stages in order and their shares of the progress bar."""
        wanted = {"load", *self.paths}
        if not (self.token_ids or self.texts):
            wanted.add("sample")
        if self.generate_tokens:
            wanted.add("generate")
        if self.needle_lengths:
            wanted.add("needle")
        return {stage: seconds for stage, seconds in STAGE_SECONDS.items() if stage in wanted}


def make_plan(
    texts: Sequence[Path], *, paths: str, needle_lengths: str, engine_options: str, **fields: Any
) -> EvalPlan:
    """A plan from the options of the command line; `fields` are taken as they are.

    Raises:
        ValueError: an option is wrong; names it, what was expected and what came.
    """
    chosen = tuple(paths.split(","))
    if unknown := [path for path in chosen if path not in PATHS]:
        raise ValueError(f"--paths must be some of {', '.join(PATHS)}, got {unknown[0]!r}")
    if not all(length.isdigit() for length in needle_lengths.split(",") if length):
        raise ValueError(f"--needle-lengths must be numbers of tokens like 512,1024, got {needle_lengths!r}")
    try:
        options = json.loads(engine_options)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--engine-options must be a JSON object, got {engine_options!r}")
    contents = []
    for path in texts:
        try:
            contents.append(path.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--text: cannot read {path}: {error}") from None
    return EvalPlan(
        texts=tuple(contents),
        paths=chosen,
        needle_lengths=tuple(int(length) for length in needle_lengths.split(",") if length),
        engine_options=options,
        **fields,
    )


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
    """
    caches = [CacheSpec.parse(REFERENCE), *(cache for cache in caches if cache.name != REFERENCE)]
    columns = TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn()
    progress = Progress(*columns, console=console, disable=verbose)
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
        reference = _load(plan, "0", "decode", 1)
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


def _run_cache(plan: EvalPlan, name: str, is_reference: bool, progress: Progress, verbose: bool) -> dict[str, Any]:
    """Run the engine of one cache."""
    wanted = {"decode", *plan.paths} if is_reference else plan.paths
    plan = replace(plan, paths=tuple(path for path in PATHS if path in wanted), is_reference=is_reference)
    stages = plan.stages()
    task_id = progress.add_task(name, total=sum(stages.values()))

    def show(done: float) -> None:
        progress.update(task_id, completed=done)

    result = run_engine("vllm_int8kv.evaluation.engines.eval_engine", asdict(plan), stages, show, verbose)
    progress.stop_task(task_id)
    return result


def scores_path(plan: EvalPlan, label: str, path: str, text: int) -> str:
    """The score file of one text on one read path."""
    return str(Path(plan.folder, f"{label}-{path}-{text}.npy"))


def _load(plan: EvalPlan, label: str, path: str, stride: int) -> list[np.ndarray]:
    try:
        return load_scores([scores_path(plan, label, path, text) for text in range(len(plan.token_ids))], stride)
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
        stride = plan.prefix_stride if path == "prefix" else 1
        scores = _load(plan, label, path, stride)
        paths[path] = summarize(scores, [text[stride - 1 :: stride] for text in reference])
        if path == "decode":
            own_decode = scores
        elif own_decode is not None:
            same = [text[stride - 1 :: stride] for text in own_decode]
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

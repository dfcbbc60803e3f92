"""What `vllm-int8kv eval` is to do: the options of its command line, checked, as plans that engines carry out."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engine_options import check_engine_options

REFERENCE = "auto"
PATHS = ("decode", "prefill", "chunked", "prefix")
"""How the scored tokens read the context: by decode steps; by prefill in one step; by prefill in chunks, of which
all but the first read what earlier ones stored; by prefill after a prefix-cache hit."""
STAGE_SECONDS = {"load": 15, "sample": 60, "decode": 30, "prefill": 10, "chunked": 10, "prefix": 20, "generate": 15}
STAGE_SECONDS |= {"needle": 30}
"""Shares of a progress bar, roughly what they take on two cores."""
MIN_TEXT_TOKENS = 2
"""A token is scored by what the model expects after the tokens before it, so the first one has no score."""
NEEDLE_ROOM = 64
"""Tokens of needle, question and answer."""


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
    text_names: tuple[str, ...] = ()
    """What an error calls them."""
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

    @property
    def cache(self) -> CacheSpec:
        """The cache of this engine, with what else the plan says of the arguments of `LLM`."""
        return CacheSpec(self.kv_cache_dtype, self.kv_cache_dtype, self.int8_kv, self.engine_options)

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

    def text_problem(self, token_ids: Sequence[Sequence[int]]) -> str | None:
        """Why the tokens of `texts` cannot be scored, if so."""
        names = self.text_names or [f"text {index}" for index in range(len(token_ids))]
        for name, ids in zip(names, token_ids, strict=True):
            if len(ids) < MIN_TEXT_TOKENS:
                return (
                    f"--text: {name} has {len(ids)} token(s), scoring needs {MIN_TEXT_TOKENS}: the first has no score"
                )
        return None

    def strides(self, path: str) -> list[int]:
        """Of each text, how far apart the tokens are that a path scores: of a text below the stride, only the last."""
        return [min(self.prefix_stride, len(ids) - 1) if path == "prefix" else 1 for ids in self.token_ids]

    def chunks(self) -> list[int]:
        """Of each text, the tokens of a chunk. One that fits into a chunk is cut into two: the second has to read."""
        return [self.chunk_tokens if len(ids) > self.chunk_tokens else -(-len(ids) // 2) for ids in self.token_ids]


def scores_path(plan: EvalPlan, label: str, path: str, text: int) -> str:
    """The score file of one text on one read path."""
    return str(Path(plan.folder, f"{label}-{path}-{text}.npy"))


def make_plan(
    texts: Sequence[Path], *, paths: str, needle_lengths: str, engine_options: str, **fields: Any
) -> EvalPlan:
    """A plan from the options of the command line; `fields` are taken as they are.

    Raises:
        ValueError: an option is wrong; names it, what was expected and what came.
        ImportError: there are arguments of `LLM`, and vLLM is not installed.
    """
    chosen = tuple(paths.split(","))
    if unknown := [path for path in chosen if path not in PATHS]:
        raise ValueError(f"--paths must be some of {', '.join(PATHS)}, got {unknown[0]!r}")
    return EvalPlan(
        texts=tuple(_read_text(path) for path in texts),
        text_names=tuple(map(str, texts)),
        paths=chosen,
        needle_lengths=_read_needle_lengths(needle_lengths),
        engine_options=_read_engine_options(engine_options),
        **fields,
    )


def _read_text(path: Path) -> str:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: cannot read {path}: {error}") from None
    if not text.strip():
        raise ValueError(f"--text: {path} holds no text; scoring needs {MIN_TEXT_TOKENS} tokens")
    return text


def _read_needle_lengths(text: str) -> tuple[int, ...]:
    lengths = [length for length in text.split(",") if length]
    if not all(length.isdecimal() for length in lengths):
        raise ValueError(f"--needle-lengths must be numbers of tokens like 512,1024, got {text!r}")
    if short := [length for length in lengths if int(length) <= NEEDLE_ROOM]:
        raise ValueError(
            f"--needle-lengths must be above {NEEDLE_ROOM}, which hidden number, question and answer take, "
            f"got {short[0]}"
        )
    return tuple(map(int, lengths))


def _read_engine_options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--engine-options must be a JSON object, got {text!r}")
    check_engine_options(options, "--engine-options")
    return options

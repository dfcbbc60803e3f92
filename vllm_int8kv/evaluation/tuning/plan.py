"""What `vllm-int8kv tune` is to do: the options of its command line, checked."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_int8kv.cache.formats import FORMATS, check_format
from vllm_int8kv.config import read_layer_policy
from vllm_int8kv.evaluation.eval_plan import EvalPlan
from vllm_int8kv.evaluation.tuning.policies import Limit

SEARCHES = ("additive", "nsga2")


@dataclass(frozen=True)
class TunePlan:
    """What to tune, and how."""

    eval_plan: EvalPlan
    """Model, texts and sizes."""
    pairs: tuple[str, ...] = tuple(FORMATS)
    """Names of the cache formats to choose from."""
    limit: Limit | None = None
    search: str = SEARCHES[0]
    num_trials: int = 100
    """Of the search nsga2."""
    seed: int = 0
    policies: tuple[Path, ...] = ()
    """Files to evaluate, without a search."""
    journal: Path | None = None

    def header(self) -> dict[str, Any]:
        """What the measurements depend on, beside the weights and the texts of the model itself."""
        plan = self.eval_plan
        texts = [hashlib.sha256(text.encode()).hexdigest() for text in plan.texts] or plan.num_samples
        names = ("model", "dtype", "int8_kv", "engine_options", "max_tokens")
        return {name: getattr(plan, name) for name in names} | {"texts": texts}


def make_limit(max_bits: float | None, max_kl: float | None, min_tokens_ratio: float | None) -> Limit | None:
    """The limit that was given, if one was.

    Raises:
        ValueError: two were given, or one is not positive.
    """
    options = {"--max-bits": max_bits, "--max-kl": max_kl, "--min-tokens-ratio": min_tokens_ratio}
    given = {option: value for option, value in options.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: expected one limit at most")
    for option, value in given.items():
        if not value > 0:
            raise ValueError(f"{option} must be positive, got {value:g}")
        return Limit(option, value)
    return None


def read_pairs(text: str) -> tuple[str, ...]:
    """The cache formats of the option --pairs; all of them if it is empty.

    Raises:
        ValueError: one does not exist, or is named twice.
    """
    if not text:
        return tuple(FORMATS)
    pairs = tuple(text.split(","))
    for index, pair in enumerate(pairs):
        check_format(pair, "--pairs")
        if pair in pairs[:index]:
            raise ValueError(f"--pairs names {pair} twice")
    return pairs


def check_options(plan: TunePlan, warn: Callable[[str], None]) -> None:
    """Check what needs no model.

    Args:
        warn: called with a line about a file that was made for another cache.

    Raises:
        ValueError: the search does not exist, or a file of --evaluate is no layer policy.
    """
    if plan.search not in SEARCHES:
        raise ValueError(f"--search must be one of {', '.join(SEARCHES)}, got {plan.search!r}")
    for path in plan.policies:
        read_layer_policy(path, None, FORMATS)
        if "kivi" in path.name.lower():
            warn(
                f"--evaluate: {path.name} was tuned for KIVI, whose K has scales per channel and group of 32 tokens; "
                "here K has them per token, rotated and equalized"
            )

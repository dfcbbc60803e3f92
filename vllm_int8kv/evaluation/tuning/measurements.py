"""What the engine measures, each thing once in the life of a journal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_int8kv.evaluation.tuning.journal import Journal
from vllm_int8kv.evaluation.tuning.schemes import EXACT

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]


class Measurements:
    """Answers of an engine, kept in a journal.

    Args:
        ask: sends a message to `tuning_engine` and waits for the result.
    """

    def __init__(self, ask: Ask, journal: Journal) -> None:
        self._ask, self._journal = ask, journal

    def summary(self, policy: Mapping[int, str], half: str = "search") -> dict[str, Any]:
        """`scoring.summarize` of the whole model; layers that a policy does not name are exact."""
        named = {str(layer): name for layer, name in sorted(policy.items()) if name != EXACT}
        message = {"policy": named, "half": half}
        return self._journal.answer(message, lambda: self._ask(message))

    def kl(self, policy: Mapping[int, str]) -> float:
        """Nats per token on the half of the texts that the search sees.

        Raises:
            ValueError: it is no number, so that no comparison with it means anything.
        """
        kl = self.summary(policy)["kl_per_token"]["value"]
        if not math.isfinite(kl):
            raise ValueError(f"the divergence of {dict(policy)} is {kl}; the model itself computes NaN or infinity")
        return kl

    def layer_errors(self, pairs: Sequence[str]) -> list[dict[str, Any]]:
        """`Tuner.layer_errors` of the engine."""
        message = {"pairs": list(pairs)}
        return self._journal.answer(message, lambda: self._ask(message))["layers"]

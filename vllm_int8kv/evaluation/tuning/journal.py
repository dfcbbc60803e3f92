"""Every measurement of a run as one line of JSON, so that an interrupted run goes on where it was.

The stages of `tune` decide by seeds and by what was measured alone, so running them again with the measurements at
hand takes no time and ends with the same policy.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_int8kv.evaluation.tuning.schemes import EXACT

Ask = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Sends a message to `tuning_engine` and waits for the result."""


class Journal:
    """The measurements of one run, by what was asked.

    Args:
        path: the file, made if it does not exist; None keeps them in memory.
        header: what the measurements depend on; a file of another header is refused.

    Raises:
        ValueError: the file is no journal, or one of another run.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self._values = path, {}
        self._file = None
        header = json.loads(json.dumps(header))
        if path is None:
            return
        lines, num_bytes = _whole_lines(path)
        if lines:
            self._check(lines[0]["header"], header)
            self._values = {line["asked"]: line["answer"] for line in lines[1:]}
            os.truncate(path, num_bytes)  # what an interruption left of a line
        self._file = path.open("a")
        if not lines:
            self._write({"header": header})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def has(self, asked: Any) -> bool:
        """Whether there is an answer."""
        return _key(asked) in self._values

    def answer(self, asked: Any, measure: Callable[[], Any]) -> Any:
        """What was measured before, or what `measure` returns, which is kept."""
        key = _key(asked)
        if key not in self._values:
            self._values[key] = measure()
            self._write({"asked": key, "answer": self._values[key]})
        return self._values[key]

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def _check(self, found: dict[str, Any], header: dict[str, Any]) -> None:
        for name in sorted(found.keys() | header.keys()):
            if found.get(name) != header.get(name):
                raise ValueError(
                    f"--journal: {self._path} is of another run: its {name} is {_short(found.get(name))}, this run's "
                    f"{_short(header.get(name))}; give the same options to continue it, or --fresh to start anew"
                )


def _key(asked: Any) -> str:
    return json.dumps(asked, sort_keys=True)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a journal but for one that was not written to its end, and how many bytes they take."""
    if not path.exists():
        return [], 0
    try:
        data = path.read_bytes()
        data = data[: data.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in data.splitlines()]
        for number, line in enumerate(lines):
            if line.keys() != ({"asked", "answer"} if number else {"header"}):
                raise ValueError(f"line {number + 1} has another form")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--journal: {path} is no journal of tune ({error}); name another file") from None
    return lines, len(data)


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

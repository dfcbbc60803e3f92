"""Texts of different kinds that come with what is installed anyway, so that everybody scores the same ones."""

import argparse
import inspect
import pydoc_data.topics
from collections.abc import Callable

import torch

from vllm_int8kv.evaluation.demo import TEXT


def texts() -> dict[str, str]:
    """By name: prose, a manual, API documentation with formulas, and source code."""
    topics = pydoc_data.topics.topics
    layers = [value for _, value in sorted(vars(torch.nn).items()) if inspect.isclass(value)]
    return {
        "prose": TEXT.read_text(),
        "manual": "\n\n".join(topics[name] for name in sorted(topics)),
        "documentation": "\n\n".join(inspect.getdoc(layer) or "" for layer in layers),
        "code": inspect.getsource(argparse),
    }


def windows(encode: Callable[[str], list[int]], num_tokens: int, num_windows: int = 1) -> dict[str, list[int]]:
    """Tokens of the texts by name, in windows one behind the other: "code", "code 2".

    Args:
        encode: of a tokenizer.
        num_tokens: of a window.
        num_windows: of each text that is long enough; the prose has one of up to 1,674 tokens.
    """
    found = {}
    for name, text in texts().items():
        token_ids = encode(text)
        for number in range(min(num_windows, max(1, len(token_ids) // num_tokens))):
            label = f"{name} {number + 1}" if number else name
            found[label] = token_ids[number * num_tokens : (number + 1) * num_tokens]
    return found

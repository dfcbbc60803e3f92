"""Texts of different kinds that come with what is installed anyway, so that everybody scores the same ones."""

import argparse
import inspect
import pydoc_data.topics

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

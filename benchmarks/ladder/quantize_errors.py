"""Errors of per-channel quantization: on uniform data as in the paper, and on keys and values of a real model.

A record of `quantize_error` also carries the time of one round trip, quantization with scales and back, which is
what its `median_us` is.
"""

import math
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import timing
from benchmarks.accuracy import capture
from benchmarks.accuracy.capture import Captured
from benchmarks.ladder import metrics
from benchmarks.ladder.operands import CheckError, LadderShape, require_memory
from vllm_int8kv.cache import ladder, library
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.evaluation import record

NUM_QUERIES = 16
"""Random queries of the score errors on uniform data; the paper takes one, whose length varies."""

HALF_STEP = 0.5 * (1 + 2**-16)
"""Largest error in steps: the quotient is rounded to fp32 first, so a tie may be off by an ulp of 127."""

NUM_TOKENS = 1024
"""Of the model's prompt: attention in float64 over all pairs of them takes seconds per layer."""

BUDGET = timing.Budget(seconds=0, min_samples=3, warmup=1)


def round_trip(x: torch.Tensor, scales: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(fp32 approximation, scales) by `quantize_per_channel`.

    Raises:
        CheckError: an error is above half a step although the scales are those of `x`.
    """
    codes, used = ladder.quantize_per_channel(x, scales=scales)
    approximation = ladder.dequantize_per_channel(codes, used)
    error = metrics.max_abs_error(x, approximation)
    if scales is None and not error <= HALF_STEP * used.max().item():
        raise CheckError(f"an error of {error} is more than half a step of {used.max().item()}")
    return approximation, used


def uniform(shape: LadderShape, device: str, seed: int, environment: dict) -> list[record.Record]:
    """Errors of U(-1, 1), beside what they must be by theory. Raises MemoryError if it does not fit."""
    require_memory(shape, 4 + 1 + 4, device)
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(shape.num_tokens, shape.num_channels, device=device).uniform_(-1, 1, generator=generator)
    query = torch.empty(NUM_QUERIES, shape.num_channels, device=device).uniform_(-1, 1, generator=generator)
    approximation, scales = round_trip(x)
    scores = metrics.score_errors(query, x, approximation)
    step = 1 / 127
    score = math.sqrt(2 / math.pi * shape.num_channels / 3 / 12) * step
    found = {
        "max_abs_error": metrics.max_abs_error(x, approximation),
        "l2_error": metrics.l2_error(x, approximation),
        **{f"score_error_{name}": value for name, value in asdict(scores).items()},
        "half_step": scales.max().item() / 2,
        "theory_max_abs_error": step / 2,
        "theory_l2_error": math.sqrt(shape.num_elements / 12) * step,
        "theory_score_error_plain": score,
        "theory_score_error_scaled": score / math.sqrt(shape.num_channels),
    }
    del approximation  # of the largest shape there is room for one
    case = asdict(shape) | {"data": "uniform(-1, 1)", "seed": seed, "num_queries": NUM_QUERIES, "dtype": "float32"}
    return [_record(case | {"device": device}, "per_channel", found, x, environment)]


def smollm2(device: str, environment: dict) -> list[record.Record]:
    """Errors of every layer of SmolLM2 on the text of the demo, for three ways to choose the scales."""
    lines = []
    for layer, (name, seen) in enumerate(capture.capture(num_tokens=NUM_TOKENS).items()):
        seen = Captured(*(t.to(device) for t in (seen.query, seen.key, seen.value)), seen.softmax_scale)
        num_tokens, num_heads, head_size = seen.query.shape
        case = {"data": "SmolLM2-135M-Instruct", "layer": layer, "layer_name": name, "device": device}
        case |= {"num_tokens": num_tokens, "num_heads": num_heads, "num_kv_heads": seen.key.shape[1]}
        case |= {"head_size": head_size, "dtype": str(seen.key.dtype).removeprefix("torch.")}
        matrix = seen.key.flatten(1)
        lines += [_record(case, impl, found, matrix, environment) for impl, found in layer_errors(seen).items()]
    return lines


def layer_errors(seen: Captured) -> dict[str, dict[str, float]]:
    """Errors of a layer's keys and values by the scheme that chooses their scales.

    per_channel: as the paper, from all tokens, which nobody knows while decoding. per_channel_static: from the
    first half of the tokens, applied to all; what sticks out later saturates. int8_custom: this project's cache.
    """
    half = len(seen.key) // 2
    approximations = {
        "per_channel": [_matrix_round_trip(x) for x in (seen.key, seen.value)],
        "per_channel_static": [_matrix_round_trip(x, x[:half]) for x in (seen.key, seen.value)],
        "int8_custom": [
            KeyTransform().undo_keys(K8V8.round_trip_k(KeyTransform().keys(seen.key))),
            K8V8.round_trip_v(seen.value),
        ],
    }
    found = {}
    num_queries_per_kv = seen.query.shape[1] // seen.key.shape[1]
    for impl, (key, value) in approximations.items():
        scores = [
            metrics.score_errors(
                seen.query[:, head], seen.key[:, head // num_queries_per_kv], key[:, head // num_queries_per_kv]
            )
            for head in range(seen.query.shape[1])
        ]
        errors = metrics.kv_errors(seen.query, seen.key, seen.value, key, value, softmax_scale=seen.softmax_scale)
        found[impl] = {
            "max_abs_error_key": metrics.max_abs_error(seen.key, key),
            "max_abs_error_value": metrics.max_abs_error(seen.value, value),
            **{
                f"score_error_{name}": sum(getattr(score, name) for score in scores) / len(scores)
                for name in ("plain", "scaled", "softmax")
            },
            **asdict(errors),
        }
    return found


def _matrix_round_trip(x: torch.Tensor, calibration: torch.Tensor | None = None) -> torch.Tensor:
    """[num_tokens, num_kv_heads, head_size] with one scale per (KV head, dim), from `calibration` if it is given."""
    scales = None if calibration is None else ladder.quantize_per_channel(calibration.flatten(1))[1]
    return round_trip(x.flatten(1), scales)[0].view(x.shape)


def _record(
    case: dict[str, Any], impl: str, found: dict[str, float], x: torch.Tensor, environment: dict
) -> record.Record:
    """The line with the errors and the time of a round trip of the matrix."""
    on_gpu = x.device.type == "cuda"
    clock = timing.gpu_clock if on_gpu else timing.wall_clock
    (taken,) = timing.interleave({"": lambda _: round_trip_only(x)}, BUDGET, clock).values()
    return record.of_run(
        environment,
        what="quantize_error",
        case=case,
        impl=impl,
        resolved_backend=f"int8kv {'cuda' if on_gpu else library.cpu_isa()}",
        metrics={name: float(f"{value:.6g}") for name, value in found.items()},
        num_threads=torch.get_num_threads(),
        **asdict(taken),
    )


def round_trip_only(x: torch.Tensor) -> torch.Tensor:
    return ladder.dequantize_per_channel(*ladder.quantize_per_channel(x))

"""Measured policies: which of them nothing beats, and where the curve bends."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_int8kv.evaluation.tuning.candidates import pareto_front
from vllm_int8kv.evaluation.tuning.search import Policy

USABLE_KL = 0.1
"""Nats per token; perplexity rises by about as much, 10 %."""


@dataclass
class Point:
    """One policy and what was measured of it."""

    name: str
    kind: str
    """uniform (one format for all layers), peer (a cache of others), tuned or file"""
    policy: Policy
    bits: float
    """mean bits per element, scales not counted"""
    bits_with_scales: float
    tokens_ratio: float
    """tokens in the same memory against the unquantized cache"""
    predicted_kl: float | None = None
    """the sum of its layers' divergences; None where they were not measured"""
    search: dict[str, Any] = field(default_factory=dict)
    """`scoring.summarize` on the half of the texts that the search saw"""
    held_out: dict[str, Any] = field(default_factory=dict)
    """and on the other half"""

    @property
    def kl(self) -> float:
        """Nats per token where the search looks."""
        return self.search["kl_per_token"]["value"]


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other point beats in memory and KL, the smallest first."""
    front = pareto_front([-point.tokens_ratio for point in points], [point.kl for point in points])
    return [points[index] for index in front]


def knee(points: Sequence[Point]) -> Point:
    """Where a frontier bends most: the point farthest below the line between its ends.

    Source: Satopää et al., "Finding a Kneedle in a Haystack" (2011), over tokens in the same memory and KL, each
    brought to 0 to 1. Points beyond `USABLE_KL` are no end that anybody would go to, unless there are no others.
    """
    usable = [point for point in points if point.kl <= USABLE_KL]
    if len(usable) < 3:
        return min(points, key=lambda point: point.kl)
    ratios, divergences = [point.tokens_ratio for point in usable], [point.kl for point in usable]

    def height(point: Point) -> float:
        x = (point.tokens_ratio - min(ratios)) / (max(ratios) - min(ratios))
        y = (point.kl - min(divergences)) / (max(divergences) - min(divergences))
        return x - y

    return max(usable, key=height)

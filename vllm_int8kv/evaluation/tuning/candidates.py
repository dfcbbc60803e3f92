"""What is left to choose from: each layer's Pareto front, and groups of layers that behave alike.

KVTuner (arXiv 2502.04420, sections 4.2 and 4.3) prunes the pairs of precisions of a layer to those that no other pair
beats in bits and error, then clusters layers that keep the same pairs with DBSCAN on their errors, so that its search
has one variable per group.
"""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import DBSCAN

from vllm_int8kv.evaluation.tuning.search import Choices

EPS_DECADES = 0.1
"""Layers are neighbours if the losses of their choices differ by a factor of 10^0.1, 26 %, in the root mean square.
KVTuner takes differences of 0.05 of e_o itself, which elementwise ratios bring to the order of 1; ours, relative to
norms, span four decades."""
MIN_SAMPLES = 2


def pareto_front(costs: Sequence[float], losses: Sequence[float]) -> list[int]:
    """Indices of the points that no other point beats in both, the cheapest first.

    Of points that equal each other in both, the first one stays.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], losses[index]))
    front: list[int] = []
    for index in order:
        if not front or losses[index] < losses[front[-1]]:
            front.append(index)
    return front


def prune(choices: Sequence[Choices]) -> list[Choices]:
    """Every layer with the choices on its Pareto front."""
    return [each.kept(pareto_front(each.costs, each.losses)) for each in choices]


def group(choices: Sequence[Choices]) -> list[Choices]:
    """Layers that keep the same choices at similar losses, put together; the others stay alone.

    Args:
        choices: of single layers.
    """
    groups: list[list[Choices]] = []
    by_names: dict[tuple[str, ...], list[Choices]] = {}
    for each in choices:
        by_names.setdefault(each.names, []).append(each)
    for alike in by_names.values():
        decades = np.log10(np.maximum([each.losses for each in alike], 1e-12))
        distances = np.sqrt(np.square(decades[:, None] - decades[None]).mean(axis=-1))
        labels = DBSCAN(eps=EPS_DECADES, min_samples=MIN_SAMPLES, metric="precomputed").fit_predict(distances)
        for label in sorted(set(labels)):
            members = [each for each, own in zip(alike, labels, strict=True) if own == label]
            groups += [[each] for each in members] if label == -1 else [members]
    return sorted(map(_merge, groups), key=lambda merged: merged.layers)


def _merge(members: Sequence[Choices]) -> Choices:
    layers = tuple(layer for each in members for layer in each.layers)
    costs = tuple(map(sum, zip(*(each.costs for each in members), strict=True)))
    losses = tuple(map(sum, zip(*(each.losses for each in members), strict=True)))
    return Choices(layers, members[0].names, costs, losses)

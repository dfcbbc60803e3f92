"""The search for a policy, against all policies there are, and by hand."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from vllm_int8kv.evaluation.sensitivity import CacheShape
from vllm_int8kv.evaluation.tuning import candidates, frontier, nsga2, search
from vllm_int8kv.evaluation.tuning.policies import Limit, ModelShape
from vllm_int8kv.evaluation.tuning.search import Choices

NAMES = ("k8v8", "k6v4", "k4v4")


def choices_of(*losses: tuple[float, ...], costs: tuple[float, ...] = (16, 10, 8)) -> list[Choices]:
    """One layer per tuple of losses."""
    return [Choices((layer,), NAMES[: len(own)], costs[: len(own)], own) for layer, own in enumerate(losses)]


def every_policy(choices):
    """(cost, loss, policy) of all there are."""
    for places in itertools.product(*(range(len(each.names)) for each in choices)):
        pairs = list(zip(choices, places, strict=True))
        policy = {each.layers[0]: each.names[place] for each, place in pairs}
        yield sum(each.costs[p] for each, p in pairs), sum(each.losses[p] for each, p in pairs), policy


layer_losses = st.tuples(*[st.floats(1e-7, 1.0)] * 3).map(sorted).map(tuple)


@settings(max_examples=60, deadline=None)
@given(st.lists(layer_losses, min_size=1, max_size=5), st.floats(0, 1))
def test_the_additive_search_finds_what_trying_all_policies_finds(losses, share):
    choices = choices_of(*losses)
    budget = len(choices) * (8 + share * 8)
    policy = search.minimize_loss(choices, budget)
    best = min(loss for cost, loss, _ in every_policy(choices) if cost <= budget * (1 + 1e-9))
    assert search.predicted_loss(choices, policy) == pytest.approx(best, rel=1e-4)
    max_loss = best * (1 + share)
    cheapest = search.minimize_cost(choices, max_loss)
    least = min(cost for cost, loss, _ in every_policy(choices) if loss <= max_loss * (1 + 1e-9))
    assert sum(each.costs[each.names.index(cheapest[each.layers[0]])] for each in choices) == least


def test_small_divergences_count_beside_large_ones():
    """A solver that stops at gaps of 1e-6 would take either of the two for the second layer."""
    choices = choices_of((1e-3, 1e-1, 0.5), (2e-7, 3e-7), costs=(16, 16, 16))
    assert search.minimize_loss(choices, 32) == {0: "k8v8", 1: "k8v8"}


def test_what_cannot_be_met_is_said():
    choices = choices_of((1e-4, 1e-3, 1e-2), (1e-4, 1e-3, 1e-2))
    with pytest.raises(ValueError, match=r"a budget of 15 cannot be met: the least that all layers cost is 16"):
        search.minimize_loss(choices, 15)
    with pytest.raises(ValueError, match=r"a KL of 0\.0001 cannot be met: the least that all layers lose is 0\.0002"):
        search.minimize_cost(choices, 1e-4)


def test_pareto_front_by_hand():
    costs, losses = [8, 6, 6, 4, 5, 4], [1.0, 2.0, 1.5, 3.0, 3.5, 3.0]
    assert candidates.pareto_front(costs, losses) == [3, 2, 0]


def test_layers_that_behave_alike_are_grouped():
    own = choices_of((1e-4, 1e-3, 1e-2), (1.05e-4, 1.0e-3, 1.04e-2), (9e-4, 9e-3, 9e-2), (1.02e-4, 1.1e-3))
    groups = candidates.group(own)
    assert [each.layers for each in groups] == [(0, 1), (2,), (3,)]
    assert groups[0].costs == (32, 20, 16) and groups[0].losses == pytest.approx((2.05e-4, 2e-3, 2.04e-2))


def point(ratio: float, kl: float) -> frontier.Point:
    return frontier.Point(str(ratio), "tuned", {}, 8, 8, ratio, None, {"kl_per_token": {"value": kl}})


def test_frontier_and_knee_by_hand():
    points = [point(2.0, 0.0), point(3.0, 0.01), point(2.5, 0.03), point(4.0, 0.1), point(6.0, 1.0)]
    assert [p.name for p in frontier.frontier(points)] == ["6.0", "4.0", "3.0", "2.0"]
    assert frontier.knee(frontier.frontier(points)).name == "3.0"
    assert frontier.knee([*points[:2], points[4]]).name == "2.0"  # two that are usable have no knee


LAYERS = choices_of(*((scale * 1e-4, scale * 1e-3, scale * 1e-2) for scale in (1, 8, 2, 5)))


def measure_of(calls):
    def measure(policy):
        calls.append(policy)
        return sum(each.losses[each.names.index(policy[each.layers[0]])] for each in LAYERS)

    return measure


def test_evolution_keeps_the_limit_and_finds_the_optimum():
    calls = []
    found = nsga2.evolve(LAYERS, measure_of(calls), budget=44, num_trials=80, seed=1)
    cost = {name: value for name, value in zip(NAMES, LAYERS[0].costs, strict=True)}
    assert calls and all(sum(cost[name] for name in policy.values()) <= 44 for policy in calls)
    best = min(loss for cost, loss, _ in every_policy(LAYERS) if cost <= 44)
    assert min(map(measure_of([]), found)) == pytest.approx(best)


def test_evolution_is_reproducible():
    first, second = [], []
    for calls in (first, second):
        nsga2.evolve(LAYERS, measure_of(calls), budget=None, num_trials=40, seed=3)
    assert first == second
    other = []
    nsga2.evolve(LAYERS, measure_of(other), budget=None, num_trials=40, seed=4)
    assert first != other


SHAPE = ModelShape({0: CacheShape(2, 64, 2), 1: CacheShape(4, 128, 2)})


def test_costs_of_a_policy():
    policy = {0: "k8v8", 1: "k6v4"}
    # 256 elements of 8 bits and 1,024 of 5; 2 heads of 132 bytes and 4 of 168.
    assert SHAPE.mean_bits(policy) == pytest.approx((256 * 8 + 1024 * 5) / 1280)
    assert SHAPE.bits_with_scales(policy) == pytest.approx(8 * (2 * 132 + 4 * 168) / 1280)
    assert SHAPE.tokens_ratio(policy) == pytest.approx(2 * 1280 / (2 * 132 + 4 * 168))
    assert SHAPE.tokens_ratio({0: "auto", 1: "auto"}) == 1 and SHAPE.mean_bits({0: "auto", 1: "auto"}) == 16
    assert SHAPE.tokens_ratio(SHAPE.uniform("fp8")) == 2


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        (Limit("--max-bits", 4.5), r"--max-bits 4\.5 cannot be met: --pairs begin at 5 bits"),
        (Limit("--min-tokens-ratio", 3.5), r"--min-tokens-ratio 3\.5 cannot be met: --pairs reach 3\.02"),
    ],
)
def test_limits_that_cannot_be_met(limit, problem):
    with pytest.raises(ValueError, match=problem):
        limit.check(SHAPE, ("k8v8", "k6v4"))


def test_budgets_of_limits():
    assert Limit("--max-bits", 5).budget(SHAPE) == 5 * 1280
    assert Limit("--min-tokens-ratio", 2).budget(SHAPE) == 1280
    assert [Limit(name, 5).unit for name in ("--max-bits", "--max-kl", "--min-tokens-ratio")] == [
        "bits",
        "bytes",
        "bytes",
    ]

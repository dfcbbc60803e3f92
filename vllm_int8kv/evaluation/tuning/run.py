"""The steps of `tune`, with an engine that answers."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.config import DEFAULT_FORMAT, read_layer_policy
from vllm_int8kv.evaluation.progress import EngineProgress
from vllm_int8kv.evaluation.sensitivity import CacheShape
from vllm_int8kv.evaluation.tuning import candidates, frontier, nsga2, search
from vllm_int8kv.evaluation.tuning.frontier import Point
from vllm_int8kv.evaluation.tuning.journal import Measurements
from vllm_int8kv.evaluation.tuning.plan import TunePlan
from vllm_int8kv.evaluation.tuning.policies import ModelShape, complete
from vllm_int8kv.evaluation.tuning.schemes import Scheme
from vllm_int8kv.evaluation.tuning.search import Choices, Policy

NUM_PAIR_CHECKS = 12
UNIFORM = ("k8v8", "k6v6", "k6v5", "k6v4", "k5v4", "k4v4")
"""Formats for all layers that the frontier is compared with, as far as their bits are among the pairs."""
PEERS = ("fp8", "plain:k8v8", "plain:k4v4")
STEP_BITS = 0.5
"""Between the policies of the frontier."""
MAX_KL_ROUNDS = 6


class TuneRun:
    """One run, with an engine that answers."""

    def __init__(
        self, plan: TunePlan, model: Mapping[str, Any], measured: Measurements, stages: EngineProgress
    ) -> None:
        self.plan, self.model, self.measured, self.stages = plan, model, measured, stages
        self.shape = ModelShape({int(layer): CacheShape(**shape) for layer, shape in model["shapes"].items()})
        schemes = [Scheme.parse(pair) for pair in plan.pairs]
        self.sides = [f"k{bits}" for bits in sorted({s.k_bits for s in schemes}, reverse=True)]
        self.sides += [f"v{bits}" for bits in sorted({s.v_bits for s in schemes}, reverse=True)]
        self._named: dict[str, Policy] = {}
        self.choices: list[Choices] = []
        """Of every layer with all pairs, once its divergences have been measured."""
        if plan.limit is not None:
            plan.limit.check(self.shape, plan.pairs)

    def say_cost(self, out: Callable[[str], None]) -> None:
        """Say how many runs of the model are ahead, and how long they take."""
        half = sum(map(len, self.model["token_ids"])) // 2
        num_runs = len(self.plan.policies) + len(UNIFORM) + len(PEERS)
        if not self.plan.policies:
            num_runs += len(self.shape.layers) * len(self.sides) // 2  # the layers before the one in hand do not run
            num_runs += NUM_PAIR_CHECKS + 30 + (self.plan.num_trials if self.plan.search == "nsga2" else 0)
        minutes = num_runs * half * self.model["seconds_per_token"] / 60
        out(f"tune: about {num_runs} runs of {half:,} tokens, {max(1, round(minutes))} min if none is in the journal")

    def tune(self) -> dict[str, Any]:
        """The five steps."""
        errors = self.measured.layer_errors(self.plan.pairs)
        self.stages.update("errors", 1.0)
        sensitivities = self._sensitivities()
        unit = self.plan.limit.unit if self.plan.limit else "bytes"
        self.choices = [self._choices(layer, sensitivities[layer], unit) for layer in self.shape.layers]
        checks = self._check_pairs()
        choices = candidates.prune(self.choices)
        groups = candidates.group(choices)
        found = self._search(choices, groups)
        pick = self._pick(choices, found)
        points = self._verify([*frontier.frontier(found), pick])
        fronts = {each.layers[0]: list(each.names) for each in choices}
        layers = []
        for own in errors:
            index = own["layer"]
            known = {"kl": sensitivities[index], "shape": vars(self.shape.layers[index]), "front": fronts[index]}
            layers.append(own | known)
        return {
            "pairs": list(self.plan.pairs),
            "limit": None if self.plan.limit is None else asdict(self.plan.limit),
            "search": self.plan.search,
            "seed": self.plan.seed,
            "layers": layers,
            "pair_checks": checks,
            "groups": [list(each.layers) for each in groups],
            "points": [asdict(point) for point in points],
            "pick": pick.name,
        }

    def evaluate(self) -> dict[str, Any]:
        """The policy files beside what other caches lose."""
        num_layers = 1 + max(*self.shape.layers, *(int(layer) for layer in self.model["sharing"]), 0)
        points = []
        for path in self.plan.policies:
            policy = complete(read_layer_policy(path, num_layers, FORMATS), self.shape.layers, DEFAULT_FORMAT)
            points.append(self._point(str(path), "file", policy))
        for stage in ("errors", "layers", "pairs", "search"):
            self.stages.update(stage, 1.0)
        return {"points": [asdict(point) for point in self._verify(points)], "pick": None}

    def _sensitivities(self) -> dict[int, dict[str, float]]:
        """KL of the whole model with one side of one layer quantized, by layer and side."""
        found: dict[int, dict[str, float]] = {}
        total = len(self.shape.layers) * len(self.sides)
        for layer in self.shape.layers:
            found[layer] = {}
            for side in self.sides:
                found[layer][side] = self.measured.kl({layer: side})
                done = (len(found) - 1) * len(self.sides) + len(found[layer])
                self.stages.update("layers", done / total)
        return found

    def _choices(self, layer: int, sensitivity: Mapping[str, float], unit: str) -> Choices:
        """What may be chosen for a layer; a pair loses what its sides lose."""
        costs = tuple(self.shape.layer_cost(layer, pair, unit) for pair in self.plan.pairs)
        schemes = map(Scheme.parse, self.plan.pairs)
        losses = tuple(sensitivity[f"k{s.k_bits}"] + sensitivity[f"v{s.v_bits}"] for s in schemes)
        return Choices((layer,), self.plan.pairs, costs, losses)

    def _check_pairs(self) -> list[dict[str, Any]]:
        """Pairs that are measured, drawn at random, beside the sum of their sides."""
        rng, checks = np.random.default_rng(self.plan.seed), []
        for number in range(NUM_PAIR_CHECKS):
            own = self.choices[rng.integers(len(self.choices))]
            place = int(rng.integers(len(own.names)))
            layer, pair = own.layers[0], own.names[place]
            measured = self.measured.kl({layer: pair})
            checks.append({"layer": layer, "pair": pair, "predicted": own.losses[place], "measured": measured})
            self.stages.update("pairs", (number + 1) / NUM_PAIR_CHECKS)
        return checks

    def _search(self, choices: Sequence[Choices], groups: Sequence[Choices]) -> list[Point]:
        """Policies, measured on the half of the search."""
        found = self._additive_policies(choices)
        if self.plan.search == "nsga2":
            limit = self.plan.limit
            found += nsga2.evolve(
                groups,
                self.measured.kl,
                budget=None if limit is None or limit.option == "--max-kl" else limit.budget(self.shape),
                num_trials=self.plan.num_trials,
                seed=self.plan.seed,
                on_trial=lambda number: self.stages.update("search", number / (self.plan.num_trials + 1)),
            )
        points = []
        for number, policy in enumerate(found):
            if all(policy != point.policy for point in points):
                self.measured.kl(policy)
                points.append(self._tuned_point(policy))
            self.stages.update("search", 1.0 if number + 1 == len(found) else 0.99)
        return points

    def _additive_policies(self, choices: Sequence[Choices]) -> list[Policy]:
        """The best policies by the sums, every `STEP_BITS`, and the one at a limit of memory."""
        step = STEP_BITS * self.shape.num_elements
        if not (self.plan.limit and self.plan.limit.unit == "bits"):
            step /= 8
        least, most = (sum(choose(each.costs) for each in choices) for choose in (min, max))
        budgets = [least, *np.arange((least // step + 1) * step, most, step), most]
        if self.plan.limit is not None and self.plan.limit.option != "--max-kl":
            budgets.append(min(most, self.plan.limit.budget(self.shape)))
        return [search.minimize_loss(choices, float(budget)) for budget in sorted(budgets)]

    def _pick(self, choices: Sequence[Choices], found: Sequence[Point]) -> Point:
        """The point that the limit asks for, or the knee of the frontier."""
        limit = self.plan.limit
        if limit is None:
            return frontier.knee(frontier.frontier(found))
        if limit.option == "--max-kl":
            return self._cheapest(choices, found, limit.value)
        budget = limit.budget(self.shape) * (1 + 1e-9)

        def cost(point: Point) -> float:
            return sum(self.shape.layer_cost(layer, name, limit.unit) for layer, name in point.policy.items())

        return min((point for point in found if cost(point) <= budget), key=lambda point: point.kl)

    def _cheapest(self, choices: Sequence[Choices], found: Sequence[Point], max_kl: float) -> Point:
        """The smallest cache whose measured KL is at most `max_kl`: sums are only what leads there."""
        best = max((p for p in found if p.kl <= max_kl), key=lambda point: point.tokens_ratio, default=None)
        target = max_kl
        for _ in range(MAX_KL_ROUNDS):
            try:
                point = self._tuned_point(search.minimize_cost(choices, target))
            except ValueError:
                break
            if point.kl <= max_kl and (best is None or point.tokens_ratio > best.tokens_ratio):
                best = point
            target *= max_kl / point.kl
        if best is None:
            least = min(point.kl for point in found)
            raise ValueError(f"--max-kl {max_kl:g} cannot be met: with the most bits of --pairs KL is {least:.2g}")
        return best

    def _tuned_point(self, policy: Policy) -> Point:
        name = base = f"tuned {self.shape.mean_bits(policy):.2f} bits"
        for number in itertools.count(2):
            if self._named.setdefault(name, policy) == policy:
                return self._point(name, "tuned", policy)
            name = f"{base} ({number})"

    def _point(self, name: str, kind: str, policy: Policy) -> Point:
        shape = self.shape
        costs = shape.mean_bits(policy), shape.bits_with_scales(policy), shape.tokens_ratio(policy)
        can_predict = self.choices and all(policy[each.layers[0]] in each.names for each in self.choices)
        predicted = search.predicted_loss(self.choices, policy) if can_predict else None
        return Point(name, kind, policy, *costs, predicted, self.measured.summary(policy))

    def _verify(self, points: Sequence[Point]) -> list[Point]:
        """Points, formats for all layers and other caches, on the half that the search did not see."""
        points = [point for number, point in enumerate(points) if point not in points[:number]]
        for name in UNIFORM:
            if not self.choices or {name[:2], name[2:]} <= set(self.sides):
                points.append(self._point(name, "uniform", self.shape.uniform(name)))
        points += [self._point(name, "peer", self.shape.uniform(name)) for name in PEERS]
        for number, point in enumerate(points):
            point.held_out = self.measured.summary(point.policy, "held_out")
            self.stages.update("verify", (number + 1) / len(points))
        return points

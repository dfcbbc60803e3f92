"""The search of KVTuner: an evolution of policies whose KL is measured, not predicted.

Two objectives, KL and memory, one variable per group of layers: its place in the group's Pareto front. Without what
the sums predict to begin with, the first generation is random, and a hundred trials end far behind the additive search
(KVTuner's 200 trials per limit cost it GPU-days).
"""

from collections.abc import Callable, Sequence

import numpy as np
import optuna

from vllm_int8kv.evaluation.tuning.search import Choices, Policy, minimize_loss

POPULATION = 20


def evolve(
    groups: Sequence[Choices],
    measure: Callable[[Policy], float],
    *,
    budget: float | None,
    num_trials: int,
    seed: int,
    on_trial: Callable[[int], None] = lambda number: None,
) -> list[Policy]:
    """Policies that no other trial beats in KL and cost.

    Args:
        groups: what may be chosen for each group of layers, the cheapest first.
        measure: KL of a policy, in nats per token.
        budget: what all layers together may cost; None for no limit.
        num_trials: policies to measure.
        seed: of everything random; equal seeds and measurements give equal trials.
        on_trial: called with the number of trials so far.
    """

    def policy_of(trial: optuna.Trial) -> tuple[Policy, float]:
        places = [trial.suggest_int(_name(each), 0, len(each.names) - 1) for each in groups]
        policy = {layer: each.names[p] for each, p in zip(groups, places, strict=True) for layer in each.layers}
        return dict(sorted(policy.items())), sum(each.costs[p] for each, p in zip(groups, places, strict=True))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        policy, cost = policy_of(trial)
        is_allowed = budget is None or cost <= budget * (1 + 1e-9)
        trial.set_constraint("budget", 0.0 if is_allowed else cost - budget)
        divergence = measure(policy) if is_allowed else float("inf")  # not worth a measurement
        on_trial(trial.number + 1)
        return divergence, cost

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for policy in _first_generation(groups, budget):
        study.enqueue_trial({_name(each): each.names.index(policy[each.layers[0]]) for each in groups})
    study.optimize(objective, n_trials=num_trials)
    best = [trial for trial in study.best_trials if trial.values[0] < float("inf")]
    return [policy_of(optuna.trial.FixedTrial(trial.params))[0] for trial in best]


def _name(group: Choices) -> str:
    return f"group of layer {group.layers[0]}"


def _first_generation(groups: Sequence[Choices], budget: float | None) -> list[Policy]:
    """What the sums predict to be best, at budgets over the whole range."""
    least, most = (sum(choose(each.costs) for each in groups) for choose in (min, max))
    budgets = np.linspace(least, most if budget is None else min(budget, most), POPULATION // 2)
    policies: list[Policy] = []
    for each in budgets:
        policy = minimize_loss(groups, float(each))
        if policy not in policies:
            policies.append(policy)
    return policies

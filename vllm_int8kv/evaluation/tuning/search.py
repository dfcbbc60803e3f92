"""The additive search: the exact solution of a multiple-choice knapsack problem.

Divergences of layers add up as long as they are small: the errors of different layers are independent, and KL is
quadratic in them. So a policy's KL is predicted by a sum of one number per layer and format, and the best policy under
a budget is an integer program with one binary variable per layer and format (as in NVIDIA Model-Optimizer's search).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Policy = dict[int, str]
"""The name of a cache format, or of a scheme, by layer index."""


@dataclass(frozen=True)
class Choices:
    """What may be chosen for one layer, or for layers that get the same."""

    layers: tuple[int, ...]
    names: tuple[str, ...]
    costs: tuple[float, ...]
    """of all the layers together: bits per element times elements, or bytes per token"""
    losses: tuple[float, ...]
    """KL in nats that each choice is predicted to add"""

    def kept(self, indices: Sequence[int]) -> "Choices":
        """The same with some of the choices."""
        pick = [tuple(values[index] for index in indices) for values in (self.names, self.costs, self.losses)]
        return Choices(self.layers, *pick)


def minimize_loss(choices: Sequence[Choices], budget: float) -> Policy:
    """The policy with the least sum of losses whose costs are at most `budget`.

    Raises:
        ValueError: the cheapest policy costs more.
    """
    least = sum(min(each.costs) for each in choices)
    if least > budget * (1 + 1e-9):
        raise ValueError(f"a budget of {budget:g} cannot be met: the least that all layers cost is {least:g}")
    return _solve(choices, minimized="losses", limited="costs", limit=budget)


def minimize_cost(choices: Sequence[Choices], max_loss: float) -> Policy:
    """The cheapest policy whose sum of losses is at most `max_loss`.

    Raises:
        ValueError: the most accurate policy loses more.
    """
    least = sum(min(each.losses) for each in choices)
    if least > max_loss * (1 + 1e-9):
        raise ValueError(f"a KL of {max_loss:.2g} cannot be met: the least that all layers lose is {least:.2g}")
    return _solve(choices, minimized="costs", limited="losses", limit=max_loss)


def predicted_loss(choices: Sequence[Choices], policy: Mapping[int, str]) -> float:
    """The sum of losses of a policy."""
    return sum(each.losses[each.names.index(policy[each.layers[0]])] for each in choices)


def _solve(choices: Sequence[Choices], *, minimized: str, limited: str, limit: float) -> Policy:
    objective = np.concatenate([getattr(each, minimized) for each in choices])
    weights = np.concatenate([getattr(each, limited) for each in choices])
    owners = np.repeat(np.arange(len(choices)), [len(each.names) for each in choices])
    one_each = (owners[None] == np.arange(len(choices))[:, None]).astype(float)
    # HiGHS stops at absolute gaps and violations of 1e-6; divergences go down to that, so both are brought to 1e6.
    limit_row = LinearConstraint(weights[None] * (1e6 / limit), -np.inf, 1e6 * (1 + 1e-9))
    result = milp(
        objective * (1e6 / objective.max()),
        constraints=[LinearConstraint(one_each, 1, 1), limit_row],
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RuntimeError(f"the solver found no policy: {result.message}")
    names = [name for each in choices for name in each.names]
    chosen = [names[index] for index in np.flatnonzero(result.x > 0.5)]
    policy = {layer: name for each, name in zip(choices, chosen, strict=True) for layer in each.layers}
    return dict(sorted(policy.items()))

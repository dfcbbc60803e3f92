"""What the first blocks say of the channels of inputs.

Channels differ by a factor of a hundred, and the input of one layer is much like that of the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
import torch

from vllm_int8kv.cache.quantizer import sanitize
from vllm_int8kv.store.inputs.kept import Kept

PRIOR_TOKENS = 8
"""How many tokens of an average channel count as seen: a first block may be short."""
MIN_SQUARE = 1e-12


@dataclass(frozen=True)
class Factors(Kept):
    """Of every layer and channel."""

    name: ClassVar[str] = "input_factors.npz"
    equalizers: torch.Tensor
    """[num_layers, hidden_size] fp32: inputs, or what is left of them, are multiplied by it before they are rounded"""
    predictors: torch.Tensor
    """[num_layers, hidden_size] fp32: the input of the layer before is multiplied by it, and subtracted"""

    @classmethod
    def measure(cls, inputs: Sequence[torch.Tensor], *, across_layers: bool) -> Self:
        """Of the inputs of every layer, `[..., hidden_size]`.

        A channel is divided by the square root of its root mean square: halfway between errors that are equal in all
        channels and errors that are in proportion. The predictor is the one of least squares.
        """
        equalizers, predictors = [], []
        previous: torch.Tensor | None = None
        for x in (sanitize(part).reshape(-1, part.shape[-1]) for part in inputs):
            predictor = torch.zeros(x.shape[1])
            if across_layers and previous is not None:
                predictor = (x * previous).sum(dim=0) / _squares(previous)
            rest = x if previous is None else x - predictor * previous
            equalizers.append((_squares(rest) / (len(x) + PRIOR_TOKENS)) ** -0.25)
            predictors.append(predictor)
            previous = x
        return cls(torch.stack(equalizers), torch.stack(predictors))

    @cached_property
    def predicts(self) -> bool:
        """Whether anything is subtracted."""
        return bool(self.predictors.any())

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {"equalizers": self.equalizers.numpy(), "predictors": self.predictors.numpy()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        return cls(*(torch.from_numpy(arrays[name]) for name in ("equalizers", "predictors")))


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of squares of every channel of `[num_tokens, hidden_size]`, and those of `PRIOR_TOKENS` average ones."""
    squares = x.square()
    return (squares.sum(dim=0) + PRIOR_TOKENS * squares.mean()).clamp_min(MIN_SQUARE)

"""What codecs know of the channels of inputs beforehand, kept in the folder by the first engine that saves.

Channels differ by a factor of a hundred, and the input of one layer is much like that of the one before. How much, the
first blocks say that are saved; later engines take that over, or their blocks would not be each other's.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import torch
from blake3 import blake3

from vllm_int8kv.cache.quantizer import sanitize
from vllm_int8kv.store.files import BadFile

NAME = "input_factors.npy"
DIGEST_BYTES = 8
PRIOR_TOKENS = 8
"""How many tokens of an average channel count as seen: a first block may be short."""
MIN_SQUARE = 1e-12


@dataclass(frozen=True)
class Factors:
    """Of every layer and channel."""

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

    @cached_property
    def digest(self) -> bytes:
        """What tells these factors from others."""
        return blake3(self._array().tobytes()).digest(length=DIGEST_BYTES)

    def _array(self) -> np.ndarray:
        return torch.stack([self.equalizers, self.predictors]).numpy()

    def write(self, path: Path) -> None:
        """Write a file that is not there yet, whole or not at all; another engine may be faster.

        Raises:
            OSError: the folder cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        try:
            with temporary.open("wb") as file:
                np.save(file, self._array())
            os.link(temporary, path)
        except FileExistsError:
            return
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The factors of a file.

        Raises:
            FileNotFoundError: nobody has saved any.
            BadFile: the file holds none.
        """
        try:
            equalizers, predictors = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError) as error:
            raise BadFile(f"{path} cannot be read ({error})") from None
        return cls(equalizers, predictors)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of squares of every channel of `[num_tokens, hidden_size]`, and those of `PRIOR_TOKENS` average ones."""
    squares = x.square()
    return (squares.sum(dim=0) + PRIOR_TOKENS * squares.mean()).clamp_min(MIN_SQUARE)


class KeptFactors:
    """The factors of one namespace.

    Args:
        path: of their file.
        across_layers: whether they predict a layer's inputs from those of the one before.
    """

    def __init__(self, path: Path, *, across_layers: bool) -> None:
        self._path, self._across_layers = path, across_layers
        self._found: Factors | None = None

    def known(self) -> Factors:
        """Those that blocks were saved with.

        Raises:
            BadFile: there are none, so that no block can be read.
        """
        if self._found is None:
            try:
                self._found = Factors.read(self._path)
            except FileNotFoundError:
                raise BadFile(f"{self._path} is gone, which says how to read it") from None
        return self._found

    def known_or_measured(self, inputs: Sequence[torch.Tensor]) -> Factors:
        """Those that blocks were saved with, or new ones from the first of them.

        Raises:
            BadFile: there are some, and they cannot be read.
            OSError: new ones cannot be written.
        """
        if self._found is None:
            if not self._path.exists():
                Factors.measure(inputs, across_layers=self._across_layers).write(self._path)
            self.known()
        return self._found

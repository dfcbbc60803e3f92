"""The codec `xsvd:R`: of the input of a layer only what its K and V are made of.

K and V are [W_k, W_v] x, so they see x in the coordinates of that matrix' singular vectors, each times its singular
value. There, errors of equal size are errors of equal size in K and V, and coordinates differ so much that entropy
coding needs a third less than with the channels of x as they are. Where fewer KV heads than query heads make the matrix
wider than high, the rest of x is never looked at. XQuant stores such latents in fixed bits for grouped queries
(arXiv 2508.10395); here they are multiples of a step, as in `bound:R`, of what is left when the input of the layer
before has been subtracted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from vllm_int8kv.store.bounded import Reader, Writer, steps_of
from vllm_int8kv.store.channels import dequantize_channels
from vllm_int8kv.store.codecs import Payload
from vllm_int8kv.store.inputs.codecs import KnowingCodec
from vllm_int8kv.store.inputs.kept import Kept, KeptInFolder
from vllm_int8kv.store.inputs.layers import InputLayer

MIN_SINGULAR_VALUE = 1e-3
"""Against the largest; sums of squares in fp32 do not tell less than 3e-4 from nothing."""


@dataclass(frozen=True)
class Basis(Kept):
    """Of every layer the singular vectors of [W_k, W_v]; W_k and W_v have norm 1, so that both count alike."""

    name: ClassVar[str] = "input_basis.npz"
    singular_values: tuple[torch.Tensor, ...]
    """[rank] fp32"""
    vectors: tuple[torch.Tensor, ...]
    """[rank, hidden_size] fp32, rounded to fp16, which costs an error of 3e-4"""

    @classmethod
    def of_metrics(cls, metrics: Sequence[torch.Tensor]) -> Self:
        """Of W^T W, `[hidden_size, hidden_size]`, of every layer, which tensor parallel ranks can add up."""
        values, vectors = [], []
        for metric in metrics:
            squares, columns = torch.linalg.eigh(metric.double())
            own = squares.clamp_min(0).sqrt()
            rank = max(1, int((own > MIN_SINGULAR_VALUE * own[-1]).sum()))
            values.append(own[-rank:].float().clamp_min(torch.finfo(torch.float32).tiny))
            vectors.append(columns[:, -rank:].T.half().float())
        return cls(tuple(values), tuple(vectors))

    @property
    def ranks(self) -> list[int]:
        """Of every layer's matrix."""
        return [len(own) for own in self.singular_values]

    def arrays(self) -> Mapping[str, np.ndarray]:
        return {
            "ranks": np.array(self.ranks),
            "singular_values": torch.cat(self.singular_values).numpy(),
            "vectors": torch.cat(self.vectors).half().numpy(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        ranks = arrays["ranks"].tolist()
        values, vectors = (torch.from_numpy(arrays[name]).float() for name in ("singular_values", "vectors"))
        return cls(values.split(ranks), vectors.split(ranks))


class LatentInputs(KnowingCodec[Basis]):
    """Multiples of the step of their token, which is a share of the root mean square of its latents.

    Args:
        relative_step: R of `xsvd:R`.
    """

    def __init__(self, layers: Sequence[InputLayer], basis: KeptInFolder[Basis], relative_step: float) -> None:
        super().__init__(layers, basis)
        self._relative_step = relative_step
        self._reader: Reader | None = None
        """The ranks are known with the basis only."""

    def encode_with(self, known: Basis, inputs: Sequence[torch.Tensor]) -> list[Payload]:
        writer = Writer(len(inputs[0]), known.ranks, self.layers[0].block_size)
        previous = torch.zeros_like(inputs[0])
        for x, values, vectors in zip(inputs, known.singular_values, known.vectors, strict=True):
            step = steps_of(x @ vectors.T * values, self._relative_step)
            rest = writer.add((x - previous) @ vectors.T * values, step)
            previous = previous + (dequantize_channels(*rest) / values) @ vectors
        return writer.payloads()

    def decode_with(self, known: Basis, payloads: Sequence[memoryview]) -> list[torch.Tensor]:
        if self._reader is None:
            self._reader = Reader(known.ranks, self.layers[0].block_size)
        previous, found = torch.zeros(()), []
        multiples = self._reader.read_whole(payloads)
        for own, values, vectors in zip(multiples, known.singular_values, known.vectors, strict=True):
            previous = previous + (dequantize_channels(*own) / values) @ vectors
            found.append(previous)
        return found

"""K and V themselves, for comparison: this project's formats and KIVI, and the error-bounded codec of the store."""

from dataclasses import dataclass

import torch

from benchmarks.accuracy.schemes import Scheme
from benchmarks.accuracy.xquant.inputs import Stepped
from benchmarks.accuracy.xquant.remat import Codec, RematSimulator, Run, Tensors


@dataclass(frozen=True)
class SchemeCodec(Codec):
    """A scheme of `schemes.py`; it says itself how many bytes it takes, and its codes are not looked at."""

    scheme: Scheme

    def start(self, model: RematSimulator) -> Run:
        def restore(index: int, x: torch.Tensor) -> Tensors:
            return self.scheme.apply(*model.project(index, x), model.calibrations[index])

        return Run(restore)

    def bytes_per_token(self, model: RematSimulator) -> float:
        """Of all layers."""
        config = model.model.config
        head_size = model.layers[0].attention.head_dim
        return len(model.layers) * config.num_key_value_heads * self.scheme.bytes_per_token(head_size)


@dataclass(frozen=True)
class BoundedCodec(Codec):
    """The store's `bound:R`: keys equalized and values as they are, as multiples of a step."""

    quantizer: Stepped

    def start(self, model: RematSimulator) -> Run:
        def restore(index: int, x: torch.Tensor) -> Tensors:
            key, value = model.project(index, x)
            equalizer = model.calibrations[index].equalizer
            restored = []
            for vectors in (key / equalizer, value):
                given, coded = self.quantizer.quantize(vectors.flatten(1))
                run.coded.append(coded)
                restored.append(given.view(vectors.shape))
            return restored[0] * equalizer, restored[1]

        run = Run(restore)
        return run

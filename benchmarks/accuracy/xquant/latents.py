"""XQuant's variants for grouped queries: X in the bases of the singular vectors of W_k and W_v, narrower than X."""

from dataclasses import dataclass

import torch

from benchmarks.accuracy.xquant.inputs import Fixed, Prediction, Stepped
from benchmarks.accuracy.xquant.remat import Codec, Coded, RematSimulator, Run, Tensors
from vllm_int8kv.store.inputs.latents import Basis

TOKENS_PER_GROUP = 128
"""The paper's, along the tokens of a channel of the latent keys."""


@dataclass(frozen=True)
class LatentCodec(Codec):
    """X U_k per channel in groups of tokens and X U_v per token, where W_k = U_k S B^T and W_v likewise.

    As wide as K and V. All outliers of X U_k are in its first channel, so channels must not share scales.
    """

    bits: int

    def start(self, model: RematSimulator) -> Run:
        def restore(index: int, x: torch.Tensor) -> Tensors:
            layer, projected = model.layers[index], []
            for weight, per_channel in ((layer.w_k, True), (layer.w_v, False)):
                left, singular, basis = torch.linalg.svd(weight, full_matrices=False)
                latent = x @ basis.T
                given, coded = per_channel_fixed(latent, self.bits) if per_channel else self._by_token(latent)
                run.coded.append(coded)
                projected.append(given @ (left * singular).T)
            return model.finish(index, *projected)

        run = Run(restore)
        return run

    def _by_token(self, latent: torch.Tensor) -> tuple[torch.Tensor, Coded]:
        return Fixed(self.bits, group=128).quantize(latent)


@dataclass(frozen=True)
class CrossLayerLatentCodec(Codec):
    """Differences to the X of the layer before, in the basis of the singular vectors of [W_k, W_v].

    Of X only what K and V of this layer see is brought up to date.
    """

    bits: int
    first_bits: int = 4
    """of the first three layers, which are stored in full width"""

    def start(self, model: RematSimulator) -> Run:
        before: torch.Tensor | None = None

        def restore(index: int, x: torch.Tensor) -> Tensors:
            nonlocal before
            layer = model.layers[index]
            if index < 3:
                before, coded = Fixed(self.first_bits, group=128).quantize(x)
            else:
                _, _, basis = torch.linalg.svd(torch.cat([layer.w_k, layer.w_v]), full_matrices=False)
                given, coded = Fixed(self.bits, group=128).quantize((x - before) @ basis.T)
                before = before + given @ basis
            run.coded.append(coded)
            return model.project(index, before)

        run = Run(restore)
        return run


@dataclass(frozen=True)
class SteppedLatentCodec(Codec):
    """X in the basis of the singular vectors of [W_k, W_v], each times its singular value, as multiples of a step.

    Of X only what K and V of this layer see is brought up to date; the rest stays what it was for the layer before.
    """

    relative_step: float
    prediction: Prediction = Prediction.previous
    norms: bool = True
    """whether W_k and W_v count alike, whatever their norms"""
    queries: bool = False
    """whether [W_q, W_k, W_v] takes the place of [W_k, W_v], for what a matrix takes whose rank is the width of X"""

    def start(self, model: RematSimulator) -> Run:
        before: torch.Tensor | None = None

        def restore(index: int, x: torch.Tensor) -> Tensors:
            nonlocal before
            layer = model.layers[index]
            weights = [layer.w_k, layer.w_v, *([layer.attention.q_proj.weight.detach()] if self.queries else [])]
            squares = [weight.T @ weight for weight in weights]
            metric = sum(own / own.trace() if self.norms else own for own in squares)
            basis = Basis.of_metrics([metric])
            (values,), (vectors,) = basis.singular_values, basis.vectors
            predicted = torch.zeros_like(x)
            if before is not None and self.prediction is Prediction.previous:
                predicted = before
            step = Stepped(self.relative_step).step(x @ vectors.T * values)
            multiples = torch.round((x - predicted) @ vectors.T * values / step)
            run.coded.append(Coded(multiples.to(torch.int16), None, torch.bfloat16.itemsize))
            before = predicted + (multiples * step / values) @ vectors
            return model.project(index, before)

        run = Run(restore)
        return run


def per_channel_fixed(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, Coded]:
    """`Fixed` along the tokens of each channel, in groups of 128 tokens; the last group may be smaller."""
    groups = [Fixed(bits).quantize(part.T.contiguous()) for part in x.split(TOKENS_PER_GROUP)]
    restored = torch.cat([given.T for given, _ in groups])
    codes = torch.cat([coded.codes.T for _, coded in groups])
    param_bytes = sum(coded.param_bytes for _, coded in groups) * x.shape[1] / len(x)
    return restored, Coded(codes, bits, param_bytes)

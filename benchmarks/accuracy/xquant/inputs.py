"""Codecs of X: what is done to it before it is quantized, how it is quantized, and what it is predicted from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

import torch

from benchmarks.accuracy.quantizers import SMALLEST_SCALE
from benchmarks.accuracy.xquant.remat import Codec, Coded, Layer, RematSimulator, Run, Tensors
from vllm_int8kv.cache.key_transform import hadamard_rotate
from vllm_int8kv.cache.quantizer import num_levels

SMALLEST_RMS = 1e-6
"""Channels that are 0 on every random token get no infinite factor."""


class Quantizer(ABC):
    """A quantizer of vectors `[num_tokens, num_channels]` fp32."""

    @abstractmethod
    def quantize(self, y: torch.Tensor) -> tuple[torch.Tensor, Coded]:
        """What is given back of `y`, and what is stored for that."""


@dataclass(frozen=True)
class Fixed(Quantizer):
    """Codes of equal length, a bf16 scale and a bf16 midpoint per token and group of channels."""

    bits: int
    group: int | None = None
    """channels that share a scale, the last group may be smaller; None for all channels of a token"""
    midpoint: bool = True
    """without one, levels lie on both sides of zero alike"""

    def quantize(self, y: torch.Tensor) -> tuple[torch.Tensor, Coded]:
        groups = [self._quantize_group(part) for part in y.split(self.group or y.shape[1], dim=1)]
        restored, codes = (torch.cat(parts, dim=1) for parts in zip(*groups, strict=True))
        param_bytes = len(groups) * torch.bfloat16.itemsize * (2 if self.midpoint else 1)
        return restored, Coded(codes.to(torch.int16), self.bits, param_bytes)

    def _quantize_group(self, y: torch.Tensor) -> Tensors:
        levels = num_levels(self.bits)
        low, high = y.aminmax(dim=1, keepdim=True)
        middle = ((low + high) / 2).bfloat16().float() if self.midpoint else torch.zeros_like(low)
        half = torch.maximum(high - middle, middle - low)
        scales = (2 * half / levels).bfloat16().float().clamp_min(SMALLEST_SCALE)
        codes = torch.round((y - middle) / scales + levels / 2).clamp(0, levels)
        return (codes - levels / 2) * scales + middle, codes - 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Stepped(Quantizer):
    """Multiples of a step that is relative to the root mean square of the token, or of a block of tokens."""

    relative_step: float
    block: int | None = None
    """tokens that share a step; None for a step per token (bf16; a block's is fp32, as the store's `bound:R` has it)"""
    group: int | None = None
    """channels that share a step"""
    first_token: float = 1.0
    """The step of the first token of a text, to which most of the attention goes, is this share of the others'."""

    def quantize(self, y: torch.Tensor, whole: torch.Tensor | None = None) -> tuple[torch.Tensor, Coded]:
        """As `Quantizer.quantize`; a step is relative to `whole` if that is given, of which `y` is what is left."""
        restored, multiples = torch.empty_like(y), torch.empty(y.shape, dtype=torch.int16)
        columns = torch.arange(y.shape[1]).split(self.group or y.shape[1])
        for tokens in torch.arange(len(y)).split(self.block or len(y)):
            for channels in columns:
                part = y[tokens][:, channels]
                step = self.step(part if whole is None else whole[tokens][:, channels])
                multiple = torch.round(part / step)
                restored[tokens[:, None], channels] = multiple * step
                multiples[tokens[:, None], channels] = multiple.to(torch.int16)
        step_bytes = 4 / self.block if self.block else torch.bfloat16.itemsize
        return restored, Coded(multiples, None, len(columns) * step_bytes)

    def step(self, part: torch.Tensor) -> torch.Tensor:
        """The length of a step of every token, `[num_tokens, 1]`, or of all."""
        squares = part.square()
        if self.block:
            return self.relative_step * squares.mean().sqrt().clamp_min(SMALLEST_SCALE)
        step = self.relative_step * squares.mean(dim=1, keepdim=True).sqrt()
        step[0] *= self.first_token
        return step.bfloat16().float().clamp_min(SMALLEST_SCALE)


class Prediction(StrEnum):
    """What a layer's X is predicted from; what is coded is the difference."""

    none = "none"
    previous = "previous"
    """the X of the layer before as it is given back (XQuant-CL)"""
    factors = "factors"
    """the same times a factor per channel, by least squares over the random tokens"""


@dataclass(frozen=True)
class Transform:
    """What X, or its difference to a prediction, is multiplied by before it is quantized."""

    norm_exponent: float = 0.5
    """a of |W_kv column|^a / rms^b; a = 1, b = 0 makes all errors of K and V alike, which suits entropy coding in
    theory, a = b = 1/2 balances them against the range of X as the plugin's equalizer does for keys"""
    rms_exponent: float = 0.5
    """b; the root mean square of what is quantized, over the random tokens"""
    powers_of_two: bool = False
    rotate: bool = False
    """by a Hadamard matrix in blocks of the largest power of two that divides the hidden size, 64 at 576"""

    def factors(self, layer: Layer, quantized: torch.Tensor) -> torch.Tensor:
        """[hidden_size], of what is quantized of the random tokens; their geometric mean is 1."""
        norms = (layer.w_k.square().sum(dim=0) + layer.w_v.square().sum(dim=0)).sqrt()
        rms = quantized.square().mean(dim=0).sqrt().clamp_min(SMALLEST_RMS)
        exponents = self.norm_exponent * norms.log2() - self.rms_exponent * rms.log2()
        exponents = exponents - exponents.mean()
        return (exponents.round() if self.powers_of_two else exponents).exp2()


PLAIN = Transform(norm_exponent=0, rms_exponent=0)
ROTATED = Transform(norm_exponent=0, rms_exponent=0, rotate=True)
EQUALIZED = Transform()
EQUALIZED_ROTATED = Transform(rotate=True)


@dataclass(frozen=True)
class InputCodec(Codec):
    """X, layer by layer, each perhaps predicted from the one before as it is given back."""

    quantizer: Quantizer
    transform: Transform = PLAIN
    prediction: Prediction = Prediction.none
    first: tuple[Quantizer, ...] = ()
    """of the first layers in place of `quantizer`; these are not predicted"""
    steps_of_whole: bool = False
    """whether the steps of a `Stepped` quantizer are relative to X, not to its difference to the prediction"""

    def start(self, model: RematSimulator) -> Run:
        before: torch.Tensor | None = None

        def restore(index: int, x: torch.Tensor) -> Tensors:
            nonlocal before
            layer, weight = model.layers[index], self._weight(model, index)
            predicted = torch.zeros_like(x) if before is None else before * weight
            residual = layer.random_input
            if index:
                residual = residual - model.layers[index - 1].random_input * weight
            factors = self.transform.factors(layer, residual)
            scaled = (x - predicted) * factors
            quantizer = self.first[index] if index < len(self.first) else self.quantizer
            whole = {"whole": x * factors} if self.steps_of_whole else {}
            given, coded = quantizer.quantize(hadamard_rotate(scaled) if self.transform.rotate else scaled, **whole)
            run.coded.append(coded)
            before = (hadamard_rotate(given) if self.transform.rotate else given) / factors + predicted
            return model.project(index, before)

        run = Run(restore)
        return run

    def _weight(self, model: RematSimulator, index: int) -> torch.Tensor | float:
        """What the X before is multiplied by to predict the X of a layer: a number or `[hidden_size]`."""
        if self.prediction is Prediction.none or index < max(1, len(self.first)):
            return 0.0
        if self.prediction is Prediction.previous:
            return 1.0
        before, now = (model.layers[i].random_input for i in (index - 1, index))
        return (before * now).mean(dim=0) / before.square().mean(dim=0).clamp_min(SMALLEST_RMS**2)

"""One layer's decode step that rematerializes K and V from INT8 X, as plain PyTorch on CPU, for timing.

The scale of a token is a factor of its K and V, and channel factors and rotation of X are folded into the weight, so X
is dequantized by a conversion and what comes out of the product is scaled: as cheap as it gets without a kernel of its
own.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.operators.layers import CheckError
from benchmarks.roofline.cost import Model
from benchmarks.timing import Budget, CallOnce, cold_copies
from vllm_int8kv.cache import reference
from vllm_int8kv.cache.quantizer import quantize

TOLERANCE = 0.02
"""Relative L2 error against fp32; K and V go through the model dtype before and after their scale and rotation."""
ROPE_BASE = 10000.0
MAX_TURNS = Budget.max_samples + Budget.warmup


class InPlaceLayer:
    """X of one sequence and the weights that make K and V of it."""

    def __init__(self, model: Model, seq_len: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model, self.dtype = model, dtype
        quantized = quantize(torch.randn(seq_len, model.hidden_size, generator=generator))
        # As many as leave a last-level cache of hundreds of MiB, unless fewer turns are timed at all.
        copies = min(cold_copies(quantized.codes.numel()), MAX_TURNS)
        self.codes = [quantized.codes.clone() for _ in range(copies)]
        self.scales = quantized.scales.to(dtype)[:, None]
        size = (model.hidden_size, 2 * model.kv_width)
        self.w_kv = (torch.randn(size, generator=generator) / model.hidden_size**0.5).to(dtype)
        self.query = torch.randn(1, model.num_heads, 1, model.head_size, generator=generator).to(dtype)
        frequencies = ROPE_BASE ** -(torch.arange(0, model.head_size, 2) / model.head_size)
        angles = torch.arange(seq_len)[:, None] * frequencies
        self.cos, self.sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]

    def attend(self, turn: int) -> torch.Tensor:
        """[num_heads, head_size], from the next copy of X."""
        kv = torch.mm(self.codes[turn % len(self.codes)].to(self.dtype), self.w_kv).mul_(self.scales)
        key, value = kv.view(len(kv), 2, self.model.num_kv_heads, self.model.head_size).unbind(dim=1)
        key, value = (x.transpose(0, 1)[None] for x in (self._rotary(key, self.cos, self.sin), value))
        return scaled_dot_product_attention(self.query, key, value, enable_gqa=True)[0, :, 0]

    def check(self) -> float:
        """The relative error of `attend` against fp32.

        Raises:
            CheckError: it is above the tolerance.
        """
        x = self.codes[0].float() * self.scales.float()
        key, value = (x @ self.w_kv.float()).view(len(x), 2, -1, self.model.head_size).unbind(dim=1)
        key = self._rotary(key, self.cos.float(), self.sin.float())
        mask = torch.ones(1, len(x), dtype=torch.bool)
        query = self.query[0].transpose(0, 1).float()
        want, _ = reference.attention(query, key, value, mask, softmax_scale=self.model.head_size**-0.5)
        error = reference.relative_error(self.attend(0).float(), want[0])
        if not error <= TOLERANCE:
            raise CheckError(f"attention from X differs from its reference by {error:.1e}, allowed {TOLERANCE:.0e}")
        return error

    def call(self) -> CallOnce:
        """What is timed."""
        return self.attend

    def _rotary(self, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = key.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

"""A model in plain PyTorch whose attention reads K and V as a quantization scheme would give them back.

Three numbers per scheme: e_a and e_o as in KVTuner (arXiv 2502.04420), the errors of attention weights and outputs
layer by layer with everything before them exact, and the KL divergence per token of the whole model, in which the
errors of all layers meet. e_o is relative to the norm of the output: elementwise ratios blow up near zero.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.accuracy.schemes import Calibration, Scheme
from benchmarks.accuracy.stress_model import LAYERS, PAIRS
from vllm_int8kv.cache.equalization import calibration_positions, calibration_token_ids
from vllm_int8kv.cache.reference import relative_error

TAIL = 0.999
"""Formats whose means are alike differ in their worst tokens."""
QUERY_STRIDE = 16
"""Attention weights are compared for every n-th query, whose rows are [num_heads, num_tokens]."""

Hook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class Simulator:
    """Texts through one model, unquantized and by scheme."""

    def __init__(self, folder: str, token_ids: Sequence[Sequence[int]]) -> None:
        ALL_ATTENTION_FUNCTIONS.register("int8kv_simulator", self._attention)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.set_attn_implementation("int8kv_simulator")
        self.token_ids = [torch.tensor(ids)[None] for ids in token_ids]
        self._hook: Hook = lambda layer, q, k, v, scale: attend(q, k, v, scale)
        self.calibrations = self._calibrate()
        self.reference = [self._log_probs(ids) for ids in self.token_ids]

    def _attention(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return self._hook(module.layer_idx, q, k, v, scaling)[None], None

    def _run(self, token_ids: torch.Tensor, hook: Hook, positions: torch.Tensor | None = None) -> torch.Tensor:
        before, self._hook = self._hook, hook
        try:
            with torch.inference_mode():
                return torch.log_softmax(self.model(token_ids, position_ids=positions).logits[0], dim=-1)
        finally:
            self._hook = before

    def _log_probs(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._run(token_ids, self._hook)

    def _calibrate(self) -> list[Calibration]:
        """Random tokens for the factors, the last text for static scales."""
        seen: list[list[torch.Tensor]] = []

        def capture(layer, q, k, v, scale):
            if layer == len(seen):
                seen.append([])
            seen[layer] += [q, k, v]
            return attend(q, k, v, scale)

        config = self.model.config
        positions = calibration_positions(config.max_position_embeddings)[None]
        self._run(calibration_token_ids(positions.numel(), config.vocab_size)[None], capture, positions)
        self._run(self.token_ids[-1], capture)
        return [Calibration.from_tensors(q, k, key, value) for q, k, _, _, key, value in seen]

    def divergences(self, scheme: Scheme, stress: int) -> list[torch.Tensor]:
        """KL(unquantized || scheme) of each token of each text, in nats."""

        def quantized(layer, q, k, v, scale):
            return attend(q, *self._cached(scheme, stress, layer, k, v), scale)

        return [
            (base.exp() * (base - self._run(ids, quantized))).sum(dim=-1)
            for ids, base in zip(self.token_ids, self.reference, strict=True)
        ]

    def layer_errors(self, scheme: Scheme, stress: int) -> tuple[list[float], list[float]]:
        """(e_a, e_o) of every layer on the first text."""
        weight_errors, output_errors = [], []

        def compare(layer, q, k, v, scale):
            k_cached, v_cached = self._cached(scheme, stress, layer, k, v)
            exact, cached = attend(q, k, v, scale), attend(q, k_cached, v_cached, scale)
            weights, cached_weights = (attention_weights(q, keys, scale) for keys in (k, k_cached))
            weight_errors.append((weights - cached_weights).abs().mean().item())
            output_errors.append(relative_error(cached, exact))
            return exact

        self._run(self.token_ids[0], compare)
        return weight_errors, output_errors

    def _cached(self, scheme, stress, layer, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as they come back, on the model of `stress_model.py` if stress > 1."""
        calibration = self.calibrations[layer]
        if stress == 1 or layer not in LAYERS:
            return scheme.apply(k, v, calibration)
        half = k.shape[-1] // 2
        factors = torch.ones(k.shape[-1])
        factors[[pair + offset for pair in PAIRS for offset in (0, half)]] = stress
        stressed = Calibration(calibration.equalizer * factors, calibration.k_amax * factors, calibration.v_amax)
        k_cached, v_cached = scheme.apply(k * factors, v, stressed)
        return k_cached / factors, v_cached


def summarize(divergences: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What is recorded of the divergences of each token, by text: their mean, their tail, and the mean by text."""
    every = torch.cat(list(divergences.values())).double()
    return {
        "kl_per_token": every.mean().item(),
        "kl_p999": every.quantile(TAIL).item(),
        "kl_by_text": {name: kl.double().mean().item() for name, kl in divergences.items()},
    }


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of one sequence; all [num_tokens, heads, head_size]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def attention_weights(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """[num_heads, num_queries, num_tokens] of every `QUERY_STRIDE`-th query."""
    positions = torch.arange(QUERY_STRIDE - 1, len(q), QUERY_STRIDE)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q[positions], k) * scale
    hidden = torch.arange(len(k))[None, :] > positions[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)

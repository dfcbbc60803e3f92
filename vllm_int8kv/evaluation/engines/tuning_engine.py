"""The engine of `vllm-int8kv tune`, run by `process.EngineProcess`.

Its first message is an `eval_plan.EvalPlan`; the result describes the model and has the texts as tokens. Each further
message asks for one measurement: `policy`, a scheme by layer index (see `tuning.schemes`; other layers are exact), and
`half` of the texts, or `pairs`, for the errors of every layer.

The model runs without a batch and without a cache. Hooks on its attention layers put K and V through the operators
that write and read a cache, with the key equalizers with which it would be served, and attend exactly over what comes
back. So errors meet in later layers as they do in serving, K and V can be quantized apart, and a layer may have any
format at any time.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import LLM
from vllm.model_executor.layers.attention import Attention

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.formats import SLOT_GROUP
from vllm_int8kv.evaluation.engines.attention_hooks import (
    KV,
    AttentionHooks,
    exact_attention,
    score_options,
    visible_keys,
)
from vllm_int8kv.evaluation.engines.eval_engine import start, write_texts
from vllm_int8kv.evaluation.engines.process import emit, finish, refuse
from vllm_int8kv.evaluation.engines.restart import RestartableModel
from vllm_int8kv.evaluation.eval_plan import EvalPlan
from vllm_int8kv.evaluation.scoring import summarize
from vllm_int8kv.evaluation.sensitivity import CacheShape
from vllm_int8kv.evaluation.tuning.schemes import EXACT, PLAIN, Scheme, through_floats, through_plain

ROWS = 128
"""Rows of logits at a time."""
LARGE_DIFFERENCE = 5.0
"""Of logits. Where all of them fall by 14, what is left of the sum is below the rounding of its terms."""
QUERY_STRIDE = 8
"""The errors of a layer come from every n-th query, whose weights are [num_heads, num_tokens]."""


class QuantizedLayers(AttentionHooks):
    """Attention through whatever scheme each layer has at the moment."""

    def __init__(self, llm: LLM) -> None:
        super().__init__(llm)
        self.policy: Mapping[int, str] = {}
        self.seen: dict[int, tuple[torch.Tensor, KV]] | None = None
        """Q, K and V of every layer, while a dict is here to keep them."""

    def store(self, index: int, layer: Attention, key: torch.Tensor, value: torch.Tensor) -> KV:
        return through(Scheme.parse(self.policy.get(index, EXACT)), layer, key, value)

    def attend(self, index: int, layer: Attention, query: torch.Tensor, kv: KV, output: torch.Tensor) -> torch.Tensor:
        if self.seen is not None and layer.kv_sharing_target_layer_name is None:
            self.seen[index] = query.float(), kv
        return exact_attention(layer, query, *kv).reshape(output.shape).to(output.dtype)


def through(scheme: Scheme, layer: Attention, key: torch.Tensor, value: torch.Tensor) -> KV:
    """What a cache of a scheme gives back of K and V of one prompt, `[num_tokens, num_kv_heads, head_size]`, fp32."""
    exact = key.float(), value.float()
    if scheme.family == EXACT:
        return exact
    if scheme.family == "format":
        stored = through_format(scheme, layer, key, value)
    elif scheme.family == PLAIN:
        stored = tuple(
            x if bits is None else through_plain(x, bits)
            for x, bits in zip(exact, (scheme.k_bits, scheme.v_bits), strict=True)
        )
    else:
        stored = tuple(through_floats(x, scheme.family) for x in exact)
    return exact[0] if scheme.k_bits is None else stored[0], exact[1] if scheme.v_bits is None else stored[1]


def through_format(scheme: Scheme, layer: Attention, key: torch.Tensor, value: torch.Tensor) -> KV:
    """K and V after the operators have written them to a cache of their own and read them again."""
    num_tokens, num_kv_heads, head_size = key.shape
    num_blocks, device = -(-num_tokens // SLOT_GROUP), key.device
    options = {"cache_format": scheme.cache_format, "key_transform": layer.impl.key_transform}
    cache = scheme.cache_format.allocate(num_blocks, num_kv_heads, SLOT_GROUP, head_size, device)
    ops.reshape_and_cache(key, value, cache, torch.arange(num_tokens, device=device), **options)
    blocks = torch.arange(num_blocks, dtype=torch.int32, device=device)[None]
    stretch = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
    stored = torch.empty(key.shape, device=device), torch.empty(key.shape, device=device)
    ops.gather_cache(*stored, cache, blocks, stretch, stretch[:1], **options)
    return stored


@dataclass
class ExactLogits:
    """What the exact model expects after every token of a piece of text."""

    following: torch.Tensor
    """[num_tokens - 1] int64, the tokens that follow"""
    logits: torch.Tensor
    """[num_tokens - 1, vocab_size] fp32"""
    lse: torch.Tensor
    """[num_tokens - 1] fp32, their log-sum-exp"""
    scores: np.ndarray
    """as of `compare` with themselves"""

    def compare(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """Rows `[num_rows, 3]` fp64, the columns of `scoring`, of other fp32 logits.

        With d the difference of the logits, KL = log(sum(p exp(d))) - sum(p d). Both terms are as small as d, so fp32
        is off by 1e-7 d, where differences of log-probabilities would be off by 1e-6. For large d the first term is
        what it is in double precision, which takes five times as long.
        """
        exact, lse = self.logits[rows], self.lse[rows]
        difference = logits - exact
        if difference.abs().max() < LARGE_DIFFERENCE:
            probs = torch.exp(exact - lse[:, None])
            growth = torch.log1p((probs * torch.expm1(difference)).sum(dim=-1))
        else:
            exact, logits, difference = exact.double(), logits.double(), difference.double()
            lse = exact.logsumexp(dim=-1)
            probs = torch.exp(exact - lse[:, None])
            growth = logits.logsumexp(dim=-1) - lse
        mean = (probs * difference).sum(dim=-1)
        log_prob = logits.gather(1, self.following[rows, None])[:, 0] - lse - growth
        same = logits.argmax(dim=-1) == exact.argmax(dim=-1)
        return torch.stack([log_prob.double(), growth.double() - mean.double(), same.double()], dim=-1)


class Tuner:
    """Measures policies on the two halves of the texts."""

    def __init__(self, llm: LLM, token_ids: Sequence[Sequence[int]]) -> None:
        self.hooks = QuantizedLayers(llm)
        (self.model,) = llm.apply_model(lambda model: model)
        if problem := self._problem():
            refuse(problem)
        names = [layer.layer_name for layer in self.hooks.layers.values()]
        self.runs = RestartableModel(self.model, llm.llm_engine.vllm_config, names)
        halves = [(ids[: len(ids) // 2], ids[len(ids) // 2 :]) for ids in token_ids]
        self.halves = {
            name: [torch.tensor(pair[half]) for pair in halves] for half, name in enumerate(("search", "held_out"))
        }
        self.exact: dict[str, list[ExactLogits]] = {"search": [], "held_out": []}
        begin = time.perf_counter()
        for half, pieces in self.halves.items():
            for number, piece in enumerate(pieces):
                hidden = self.runs.keep(number, piece) if half == "search" else self.runs.run(-1, piece)
                self.exact[half].append(self._expect(piece, hidden))
        self.seconds_per_token = (time.perf_counter() - begin) / sum(map(len, token_ids))
        if self.hooks.sharing:  # they read what a block stored that a restart leaves out
            self.runs.can_restart = False
        self.runs.check(0, self.halves["search"][0], max(self.hooks.layers))

    def _problem(self) -> str | None:
        if self.hooks.unquantized:
            return f"tune needs the INT8 cache in every attention layer; {self.hooks.unquantized[0]} has another one"
        device = next(self.model.parameters()).device
        if device.type != "cpu":
            return f"tune needs the operators of all cache formats, which exist on CPU; the engine is on {device.type}"
        return None

    def _expect(self, token_ids: torch.Tensor, hidden: torch.Tensor) -> ExactLogits:
        logits = torch.cat(list(self._logits(hidden, len(token_ids) - 1)))
        exact = ExactLogits(token_ids[1:], logits, logits.double().logsumexp(dim=-1).float(), np.empty(0))
        exact.scores = self.score(exact, hidden)
        return exact

    def _logits(self, hidden: torch.Tensor, num_rows: int) -> Iterator[torch.Tensor]:
        for begin in range(0, num_rows, ROWS):
            with torch.inference_mode():
                yield self.model.compute_logits(hidden[begin : min(begin + ROWS, num_rows)]).float()

    def score(self, exact: ExactLogits, hidden: torch.Tensor) -> np.ndarray:
        """`[num_tokens - 1, 3]`, as `ExactLogits.compare` has it, from the last hidden states of a run."""
        num_rows, scores = len(exact.following), []
        for begin, logits in zip(range(0, num_rows, ROWS), self._logits(hidden, num_rows), strict=True):
            scores.append(exact.compare(slice(begin, begin + len(logits)), logits))
        return torch.cat(scores).numpy()

    def measure(self, policy: Mapping[int, str], half: str) -> dict[str, Any]:
        """What `scoring.summarize` says of a policy on a half of the texts."""
        self.hooks.policy = policy
        first = min((layer for layer, name in policy.items() if name != EXACT), default=0)
        scores = []
        for number, (piece, exact) in enumerate(zip(self.halves[half], self.exact[half], strict=True)):
            hidden = self.runs.run(number if half == "search" else -1, piece, first)
            scores.append(self.score(exact, hidden))
        return summarize(scores, [exact.scores for exact in self.exact[half]])

    def layer_errors(self, pairs: Sequence[str]) -> list[dict[str, Any]]:
        """The errors of every layer by itself, with everything before it exact, on the first piece.

        Returns:
            Of each `layer`: e_k and e_v, relative errors of K and V by bits; e_a, the mean absolute error of attention
            weights by bits of K; e_o, the relative error of the output by pair (KVTuner, arXiv 2502.04420, with norms
            in place of elementwise ratios).
        """
        self.hooks.policy, self.hooks.seen = {}, {}
        try:
            self.runs.run(-1, self.halves["search"][0])
            seen = self.hooks.seen
        finally:
            self.hooks.seen = None
        return [{"layer": index, **_errors(self.hooks.layers[index], *seen[index], pairs)} for index in sorted(seen)]


def _errors(layer: Attention, query: torch.Tensor, kv: KV, pairs: Sequence[str]) -> dict[str, dict[str, float]]:
    key, value = kv
    positions = torch.arange(QUERY_STRIDE - 1, len(query), QUERY_STRIDE)
    mask, query = visible_keys(layer, query)[positions], query[positions]
    options = score_options(layer) | {"positions": positions}
    schemes = [Scheme.parse(pair) for pair in pairs]
    weights, _ = reference.attention_weights(query, key, mask, **options)
    values = {bits: through(Scheme.parse(f"v{bits}"), layer, key, value)[1] for bits in {s.v_bits for s in schemes}}
    heads = query.shape[1] // key.shape[1]

    def attend(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(heads, dim=1))

    exact = attend(weights, value)
    errors: dict[str, dict[str, float]] = {"e_k": {}, "e_v": {}, "e_a": {}, "e_o": {}}
    for bits, stored in values.items():
        errors["e_v"][str(bits)] = reference.relative_error(stored, value)
    for bits in {scheme.k_bits for scheme in schemes}:
        stored = through(Scheme.parse(f"k{bits}"), layer, key, value)[0]
        own_weights, _ = reference.attention_weights(query, stored, mask, **options)
        errors["e_k"][str(bits)] = reference.relative_error(stored, key)
        errors["e_a"][str(bits)] = (own_weights - weights).abs().mean().item()
        for scheme in schemes:
            if scheme.k_bits == bits:
                errors["e_o"][scheme.name] = reference.relative_error(attend(own_weights, values[scheme.v_bits]), exact)
    return errors


def main() -> None:
    plan = EvalPlan(**json.loads(sys.stdin.readline()))
    emit(stage="load", done=0.0)
    llm = start(plan)
    emit(stage="load", done=1.0)
    token_ids = plan.token_ids or write_texts(llm, plan)
    try:
        tuner = Tuner(llm, token_ids)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # of models that need a batch around them
        refuse(f"tune cannot run {plan.model} outside of a batch ({type(error).__name__}: {error})")
    emit(stage="exact", done=1.0)
    model_config = llm.llm_engine.vllm_config.model_config
    native = (model_config.hf_config.dtype or model_config.dtype).itemsize
    description = {
        "token_ids": token_ids,
        "shapes": {
            index: vars(CacheShape(layer.num_kv_heads, layer.head_size, native))
            for index, layer in sorted(tuner.hooks.layers.items())
        },
        "sharing": tuner.hooks.sharing,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "perplexity": {half: tuner.measure({}, half)["perplexity"] for half in tuner.halves},
        "seconds_per_token": tuner.seconds_per_token,
        "can_restart": tuner.runs.can_restart,
    }
    emit(result=description)
    for line in sys.stdin:
        message = json.loads(line)
        if "pairs" in message:
            emit(result={"layers": tuner.layer_errors(message["pairs"])})
        else:
            policy = {int(layer): name for layer, name in message["policy"].items()}
            emit(result=tuner.measure(policy, message["half"]))
    finish(llm, {})


if __name__ == "__main__":
    main()

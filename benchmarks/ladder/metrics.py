"""How far a quantized cache is from the one it stands for. Everything is computed and summed in float64.

The first three are those of arXiv 2601.04719, which sums the first one in float32: from a few million elements on
its additions round away, and its published L2 errors are up to 3.3 times too small. `kv_errors` are those by which
KVTuner (arXiv 2502.04420) chooses precisions.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

CHUNK_ELEMENTS = 1 << 24
"""Elements that are held in float64 at a time."""


def l2_error(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """sqrt(sum (x - approximation)^2) over all elements; both of one shape."""
    return _norm(_differences(x, approximation))


def max_abs_error(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """max |x - approximation| over all elements; both of one shape; 0 for none."""
    return max((part.abs().max().item() for part in _differences(x, approximation)), default=0.0)


def relative_error(x: torch.Tensor, approximation: torch.Tensor) -> float:
    """L2 error relative to the L2 norm of `x`; infinite where zeros are approximated by something else."""
    return _ratio(l2_error(x, approximation), _norm(part.double() for part in _parts(x)))


@dataclass(frozen=True)
class ScoreErrors:
    """Means of |difference| over all queries and keys."""

    plain: float
    """of q . k, the paper's attention-score error"""
    scaled: float
    """of q . k / sqrt(num_channels), which is what softmax gets"""
    softmax: float
    """of the probabilities softmax(q . k / sqrt(num_channels)) over all keys"""


def score_errors(query: torch.Tensor, key: torch.Tensor, approximation: torch.Tensor) -> ScoreErrors:
    """Errors of attention scores, without mask.

    Args:
        query: [num_queries, num_channels].
        key, approximation: [num_keys, num_channels].
    """
    query = query.double()
    want, got = (torch.cat([query @ part.double().T for part in _parts(k)], dim=-1) for k in (key, approximation))
    scale = key.shape[-1] ** -0.5
    plain = _mean_abs(want, got)
    softmax = _mean_abs(torch.softmax(want * scale, dim=-1), torch.softmax(got * scale, dim=-1))
    return ScoreErrors(plain, plain * scale, softmax)


@dataclass(frozen=True)
class KVErrors:
    """Errors of one layer, each an L2 norm of the difference relative to that of the exact tensor."""

    e_k: float
    """keys"""
    e_v: float
    """values"""
    e_a: float
    """attention probabilities, from approximate keys"""
    e_o: float
    """attention output, from approximate keys and values"""


def kv_errors(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    approximate_key: torch.Tensor,
    approximate_value: torch.Tensor,
    *,
    softmax_scale: float,
) -> KVErrors:
    """KVTuner's errors of causal attention over one sequence.

    KVTuner averages |difference| / |element|, which an element near zero dominates, and takes the plain mean for
    the probabilities. Here all four are relative to the norm of the whole tensor.

    Args:
        query: [num_tokens, num_heads, head_size].
        key, value, approximate_key, approximate_value: [num_tokens, num_kv_heads, head_size].
    """
    num_queries_per_kv = query.shape[1] // key.shape[1]
    hidden = torch.ones(len(query), len(query), dtype=torch.bool, device=query.device).triu(1)

    def attend(head: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query[:, head].double() @ keys[:, head // num_queries_per_kv].double().T * softmax_scale
        probabilities = torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1)
        return probabilities, probabilities @ values[:, head // num_queries_per_kv].double()

    error, norm = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for head in range(query.shape[1]):
        exact = attend(head, key, value)
        got = attend(head, approximate_key, approximate_value)
        norm += torch.tensor([tensor.square().sum() for tensor in exact])
        error += torch.tensor([(a - b).square().sum() for a, b in zip(exact, got, strict=True)])
    e_a, e_o = (_ratio(*pair) for pair in zip(error.sqrt().tolist(), norm.sqrt().tolist(), strict=True))
    return KVErrors(relative_error(key, approximate_key), relative_error(value, approximate_value), e_a, e_o)


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm > 0 else (0.0 if error == 0 else math.inf)


def _norm(parts: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def _mean_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


def _parts(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of `x` as a matrix of its last dimension, in parts of about CHUNK_ELEMENTS; none if it is empty."""
    if x.numel() > 0:
        rows = x.reshape(-1, x.shape[-1] if x.dim() else 1)
        yield from rows.split(max(1, CHUNK_ELEMENTS // rows.shape[1]))


def _differences(x: torch.Tensor, approximation: torch.Tensor) -> Iterator[torch.Tensor]:
    """x - approximation in float64, in parts."""
    if x.shape != approximation.shape:
        raise ValueError(f"approximation must have the shape of x, {list(x.shape)}, got {list(approximation.shape)}")
    for part, other in zip(_parts(x), _parts(approximation), strict=True):
        yield part.double() - other.double()

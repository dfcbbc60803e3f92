"""Teacher-forced scores of a text: per token the log-probability, the KL divergence from a reference, and agreement.

One engine is the reference and stores its log-probabilities over the whole vocabulary; the others compare each row
with it as they compute it and keep three numbers. Intervals come from a bootstrap over blocks of neighbouring
tokens, because the errors of neighbours are correlated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BLOCK_TOKENS = 64
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
LOG_PROB, KL, TOP1 = range(3)
"""Columns of a score file: log-probability of the token that follows, KL(reference || row) in nats, 1 where both
find the same token most likely."""


@dataclass(frozen=True)
class TextFiles:
    """Where the scores of one text go. Row i is about the token after `token_ids[i]`."""

    token_ids: list[int]
    scores_path: str
    """.npy [num_rows, 3] fp64; NaN where nothing was recorded."""
    reference_path: str
    """.npy [num_rows, vocab_size] fp32 log-probabilities of the reference."""
    is_reference: bool = False
    """Write the reference rather than compare with it."""

    @property
    def num_rows(self) -> int:
        return len(self.token_ids) - 1

    def create(self, vocab_size: int) -> None:
        """Make the files anew, without a score."""
        np.lib.format.open_memmap(self.scores_path, "w+", np.float64, (self.num_rows, 3))[:] = np.nan
        if self.is_reference:
            np.lib.format.open_memmap(self.reference_path, "w+", np.float32, (self.num_rows, vocab_size)).flush()


class Recorder:
    """Scores rows of one text into its files."""

    def __init__(self, files: TextFiles) -> None:
        self.files = files
        self.scores = np.load(files.scores_path, mmap_mode="r+")
        self.reference = np.load(files.reference_path, mmap_mode="r+" if files.is_reference else "r")

    def record(self, first_row: int, log_probs: np.ndarray) -> None:
        """Score `log_probs` [num_rows, vocab_size], the rows from `first_row` on.

        Raises:
            ValueError: a row is no probability distribution.
        """
        rows = slice(first_row, first_row + len(log_probs))
        if self.files.is_reference:
            self.reference[rows] = log_probs
        p, q = self.reference[rows].astype(np.float64), log_probs.astype(np.float64)
        sums = np.exp((p, q)).sum(axis=-1)
        if not np.allclose(sums, 1, atol=1e-3):
            raise ValueError(
                f"rows {rows.start} to {rows.stop - 1}: probabilities sum up to {sums.min():.3g} to {sums.max():.3g}, "
                "not 1"
            )
        following = self.files.token_ids[rows.start + 1 : rows.stop + 1]
        self.scores[rows, LOG_PROB] = q[np.arange(len(q)), following]
        self.scores[rows, KL] = (np.exp(p) * (p - q)).sum(axis=-1)
        self.scores[rows, TOP1] = p.argmax(axis=-1) == q.argmax(axis=-1)


def every(texts: Sequence[np.ndarray], strides: Sequence[int]) -> list[np.ndarray]:
    """The rows of each text that are scored if only every so many tokens are."""
    return [text[stride - 1 :: stride] for text, stride in zip(texts, strides, strict=True)]


def load_scores(paths: Sequence[str | Path], strides: Sequence[int] | None = None) -> list[np.ndarray]:
    """The rows of each text, `[num_rows, 3]`, or every so many of them.

    Raises:
        ValueError: one of them was not recorded.
    """
    texts = every([np.load(path) for path in paths], strides or [1] * len(paths))
    for path, text in zip(paths, texts, strict=True):
        if missing := int(np.isnan(text).any(axis=-1).sum()):
            raise ValueError(f"{missing} of {len(text)} rows of {Path(path).name} were not recorded")
    return texts


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(texts: Sequence[np.ndarray], seed: int = 0) -> Interval:
    """Mean over all tokens of all texts, each `[num_tokens]`, with a percentile interval of a block bootstrap.

    Source: the block bootstrap of Carlstein, Annals of Statistics 14 (1986), with blocks of `BLOCK_TOKENS`.
    """
    blocks = [text[begin : begin + BLOCK_TOKENS] for text in texts for begin in range(0, len(text), BLOCK_TOKENS)]
    sums = np.array([block.sum() for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    chosen = np.random.default_rng(seed).integers(len(blocks), size=(NUM_RESAMPLES, len(blocks)))
    means = sums[chosen].sum(axis=-1) / sizes[chosen].sum(axis=-1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(sums.sum() / sizes.sum()), float(low), float(high))


def summarize(scores: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict:
    """The numbers of one cache on one read path.

    Args:
        scores, reference: per text the rows of the cache and the same rows of the reference, `[num_rows, 3]`.

    Returns:
        num_tokens; kl_per_token, top1_agreement, perplexity_change (relative), each with `value`, `low` and `high`;
        perplexity; kl_p99, kl_p999 and kl_max, quantiles over the tokens.
    """
    change = mean_interval(
        [base[:, LOG_PROB] - text[:, LOG_PROB] for base, text in zip(reference, scores, strict=True)]
    )
    rows = np.concatenate(scores)
    return {
        "num_tokens": len(rows),
        "kl_per_token": vars(mean_interval([text[:, KL] for text in scores])),
        "kl_p99": float(np.quantile(rows[:, KL], 0.99)),
        "kl_p999": float(np.quantile(rows[:, KL], 0.999)),
        "kl_max": float(rows[:, KL].max()),
        "top1_agreement": vars(mean_interval([text[:, TOP1] for text in scores])),
        "perplexity": float(np.exp(-rows[:, LOG_PROB].mean())),
        "perplexity_change": {name: float(np.expm1(value)) for name, value in vars(change).items()},
    }

"""Scores of texts: divergences by hand, intervals, and what must not pass unnoticed."""

import math

import numpy as np
import pytest

from vllm_int8kv.evaluation import scoring
from vllm_int8kv.evaluation.scoring import KL, LOG_PROB, TOP1, Recorder, TextFiles

P = [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]
Q = [[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]


@pytest.fixture
def files(tmp_path):
    """Score files of one text of three tokens: the reference's and another's."""
    reference = TextFiles([0, 1, 2], str(tmp_path / "p.npy"), str(tmp_path / "reference.npy"), is_reference=True)
    other = TextFiles([0, 1, 2], str(tmp_path / "q.npy"), reference.reference_path)
    reference.create(vocab_size=3)
    other.create(vocab_size=3)
    return reference, other


def test_scores_by_hand(files):
    reference, other = files
    Recorder(reference).record(0, np.log(np.array(P, np.float32)))
    recorder = Recorder(other)
    for row in (1, 0):  # in any order, one at a time
        recorder.record(row, np.log(np.array(Q[row : row + 1], np.float32)))
    base, scores = scoring.load_scores([reference.scores_path, other.scores_path])
    assert scores[:, KL] == pytest.approx([0.25 * math.log(2), 0], abs=1e-7)
    assert scores[:, TOP1].tolist() == [0, 1]
    assert scores[:, LOG_PROB] == pytest.approx([math.log(0.5), math.log(0.8)], rel=1e-6)
    assert (base[:, KL] == 0).all() and (base[:, TOP1] == 1).all()
    found = scoring.summarize([scores], [base])
    assert found["perplexity_change"]["value"] == pytest.approx(math.sqrt(0.25 / 0.5) - 1, rel=1e-6)
    assert found["perplexity"] == pytest.approx(1 / math.sqrt(0.4), rel=1e-6)
    assert (found["num_tokens"], found["top1_agreement"]["value"]) == (2, 0.5)


def test_a_row_that_is_no_distribution_is_refused(files):
    Recorder(files[0]).record(0, np.log(np.array(P, np.float32)))
    with pytest.raises(ValueError, match=r"rows 1 to 1: probabilities sum up to 1 to 3, not 1"):
        Recorder(files[1]).record(1, np.zeros((1, 3), np.float32))


def test_a_row_left_out_is_noticed(files):
    Recorder(files[0]).record(1, np.log(np.array(P[1:], np.float32)))
    with pytest.raises(ValueError, match=r"1 of 2 rows of p\.npy were not recorded"):
        scoring.load_scores([files[0].scores_path])
    (every_second,) = scoring.load_scores([files[0].scores_path], strides=[2])
    assert every_second.shape == (1, 3)


def test_interval_covers_the_mean_and_knows_of_correlation():
    rng = np.random.default_rng(0)
    independent = rng.normal(size=(200, 4 * 1024))
    covered = 0
    for row in independent:
        interval = scoring.mean_interval([row[:1000], row[1000:]])
        assert interval.low < interval.value < interval.high
        covered += interval.low < 0 < interval.high
    assert 0.88 <= covered / 200 <= 0.99  # 0.95, within four standard deviations
    repeated = np.repeat(independent[0][:64], 64)  # 64 values, each for a whole block
    wide, narrow = scoring.mean_interval([repeated]), scoring.mean_interval([rng.permutation(repeated)])
    assert (wide.high - wide.low) > 4 * (narrow.high - narrow.low)

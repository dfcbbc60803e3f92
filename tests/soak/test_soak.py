"""The short form of the soak, see `soak.py`; the long one is `make soak`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import soak

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> soak.Result:
    return soak.run(1.0, 48, tmp_path_factory.mktemp("soak") / "log.txt", per_length=1)


def test_nothing_is_lost_corrupt_or_different(result):
    assert not result.problems()


def test_the_load_was_one(result):
    assert max(result.usage) > 0.95
    assert result.metrics["vllm:prefix_cache_hits_total"] > 0
    assert result.compared > 20


@pytest.mark.parametrize(("seconds", "passes"), [(60, True), (1800, False)])
def test_memory_grows_while_a_server_warms_up_only(seconds, passes):
    metrics = {"vllm:num_preemptions_total": 1, "vllm:kv_cache_usage_perc": 0, "vllm:num_requests_running": 0}
    rss = [100] * 30 + [108] * 10
    result = soak.Result(requests=soak.Counter(soak.KINDS), rss=rss, seconds=seconds, metrics=metrics)
    assert result.problems() == ([] if passes else ["memory grew by 8.0% from the third to the last quarter"])


def test_a_difference_is_explained_by_a_near_tie_only():
    idle = soak.Idle(["a", " b", " c"], [-0.1, -0.7, -0.2], [1.0, 1e-5, 2.0])
    assert idle.gap_where_it_parts("a x") == 1e-5
    assert idle.gap_where_it_parts("x") == 1.0
    assert idle.gap_where_it_parts("a b d") == 2.0


def test_logprobs_are_compared_up_to_the_first_other_token():
    idle = soak.Idle(["a", " b", " c"], [-0.1, -0.7, -0.2], [1.0, 1e-5, 2.0])
    assert idle.noise(["a", " b", " x"], [-0.11, -0.68, -9.0]) == pytest.approx(0.02)
    assert idle.noise(["x"], [-9.0]) == 0.0

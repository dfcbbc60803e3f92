"""A journal gives back what was measured, and nothing of another run."""

import pytest

from vllm_int8kv.evaluation.tuning.journal import Journal

HEADER = {"model": "some/model", "max_tokens": 1024}


def measure_never():
    raise AssertionError("measured again")


def test_what_was_measured_is_not_measured_again(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = Journal(path, HEADER)
    assert first.answer({"b": 1, "a": [2]}, lambda: {"kl": 0.1}) == {"kl": 0.1}
    assert first.answer({"a": [2], "b": 1}, measure_never) == {"kl": 0.1}
    first.close()
    again = Journal(path, HEADER)
    assert again.has({"a": [2], "b": 1}) and not again.has("other")
    assert again.answer({"a": [2], "b": 1}, measure_never) == {"kl": 0.1}
    assert again.answer("other", lambda: 3) == 3
    again.close()
    assert Journal(path, HEADER).answer("other", measure_never) == 3


@pytest.mark.parametrize("cut", [1, 10, 25])
def test_a_line_that_was_cut_off_is_measured_again(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, HEADER)
    for name in ("first", "second"):
        journal.answer(name, lambda name=name: {"of": name})
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path, HEADER)
    assert journal.answer("first", measure_never) == {"of": "first"}
    assert journal.answer("second", lambda: "anew") == "anew"
    journal.close()
    assert Journal(path, HEADER).answer("second", measure_never) == "anew"


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, HEADER).close()
    problem = r"its max_tokens is 1024, this run's 512; give the same options to continue it, or --fresh to start anew"
    with pytest.raises(ValueError, match=problem):
        Journal(path, HEADER | {"max_tokens": 512})


@pytest.mark.parametrize("content", [b"{}\n", b"no JSON\n", b"[1]\n", b'{"header": {}}\n{"asked": 1}\n'])
def test_a_file_that_is_no_journal_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.jsonl is no journal of tune \(.*\); name another file"):
        Journal(path, HEADER)
    assert path.read_bytes() == content


def test_without_a_file_it_remembers():
    journal = Journal(None, HEADER)
    assert journal.answer("asked", lambda: 1) == journal.answer("asked", measure_never) == 1

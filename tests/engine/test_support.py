"""The support table of tests/README.md says what the tests say."""

import json

import pytest
import support


@pytest.fixture
def recorded() -> dict:
    if not support.RECORD.exists():
        pytest.fail("there is no support table: run `make support`")
    return json.loads(support.RECORD.read_text())["rows"]


def test_the_table_has_the_rows_of_the_tests(request, recorded):
    """Of the tests collected with this one: all of them, when the whole suite runs."""
    collected = support.rows(request.session.items)
    for feature, (outcome, text, tests) in collected.items():
        assert recorded[feature][:2] == [outcome, text]
        assert set(tests) <= set(recorded[feature][2])
    files = {item.nodeid.split("::")[0] for item in request.session.items}
    for feature, (_, _, tests) in recorded.items():
        assert feature in collected or any(test.split("::")[0] not in files for test in tests), f"{feature} has no test"


def test_tests_may_not_disagree_about_a_feature(request):
    class Item:
        nodeid = "test_x.py::test_y"

        def __init__(self, mark) -> None:
            self.mark = mark

        def iter_markers(self, name):
            return [self.mark.mark]

    with pytest.raises(ValueError, match="says refused"):
        support.rows([Item(support.supports("LoRA", "so")), Item(support.refuses("LoRA", "so"))])

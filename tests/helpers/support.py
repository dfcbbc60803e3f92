"""The support table of tests/README.md: each row is a marker on the tests that show it.

`pytest --write-support` records the rows whose tests all ran and passed in `benchmarks/results/support.json`, and
`python -m benchmarks.report` writes the table from it.
"""

import json
from pathlib import Path

import pytest

from vllm_int8kv.evaluation.machine import vllm_distribution

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "support.json"


def supports(feature: str, how: str) -> pytest.MarkDecorator:
    """The feature works, as the test shows; `how` says by what comparison."""
    return pytest.mark.support(feature, "yes", how)


def refuses(feature: str, why: str) -> pytest.MarkDecorator:
    """The feature does not work and is refused at start-up, as the test shows."""
    return pytest.mark.support(feature, "refused", why)


def rows(items: list[pytest.Item]) -> dict[str, list]:
    """feature -> [outcome, explanation, sorted names of its tests] of collected tests."""
    found: dict[str, list] = {}
    for item in items:
        for mark in item.iter_markers("support"):
            feature, outcome, text = mark.args
            row = found.setdefault(feature, [outcome, text, []])
            if row[:2] != [outcome, text]:
                raise ValueError(f"{item.nodeid} says {outcome}, {text!r} of {feature!r}; another test {row[:2]}")
            row[2] = sorted({*row[2], item.nodeid.split("[")[0]})
    return found


class Recorder:
    """pytest plug-in: notes which marked tests passed, and writes the record at the end."""

    def __init__(self) -> None:
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        marked = [item for item in session.items if item.get_closest_marker("support")]
        failed = sorted(item.nodeid for item in marked if item.nodeid not in self.passed)
        if failed:
            raise pytest.UsageError(f"no support table: these did not run or failed: {', '.join(failed)}")
        record = {"vllm": vllm_distribution().version, "rows": rows(marked)}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")

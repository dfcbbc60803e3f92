"""Runs and their rows: written whole, read back, continued; what becomes a record and what does not."""

import json
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from vllm_int8kv.commands.bench import config as bench_config
from vllm_int8kv.commands.bench import figures, summary, sweep
from vllm_int8kv.evaluation import record

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
K6V4 = "int8_custom:format=k6v4"


@pytest.fixture
def config():
    return bench_config.load(ROOT / "configs" / "bench" / "cpu_smoke.yaml")


ENVIRONMENT = {"device": "a CPU", "torch": "2.13.0", "vllm": "0.32.0"}
REPLICA = {"host": "a", "backends": ["CPU_ATTN"], "kv_cache_tokens": 1000, "environment": ENVIRONMENT}


def make_run(config, impl="auto", **changes):
    rows = [
        sweep.Row(f"{i:06d}", 128, 16, ttft_ms=5.0, itl_ms=[2.0] * 15, e2e_ms=35.0, first_token=i)
        for i in range(config.cases[0].num_requests)
    ]
    run = sweep.Run(impl, 0, asdict(config.cases[0]), 2.0, [REPLICA] * 2, 8, rows=rows)
    return replace(run, **changes)


@pytest.fixture
def origin(config):
    return sweep.Origin("cpu_smoke", sweep.sha256(config), "a CPU", "0123", False)


def test_runs_read_back_as_written(config, origin, tmp_path):
    started = sweep.open_sweep(tmp_path, origin, 2, fresh=False)
    first, second = make_run(config), make_run(config, "int8_custom", lost=["replica 0"], resubmitted=3)
    started.append(first)
    started.append(second)
    found = sweep.read(started.path)
    assert list(found.runs.values()) == [first, second]
    assert found.origin == origin
    assert found.is_done("auto", 0, config.cases[0])
    assert not found.is_done("int8_custom", 0, config.cases[0]), "a replica was lost"
    assert not found.is_done("auto", 1, config.cases[0])


def test_a_torn_run_is_cut_off(config, origin, tmp_path):
    started = sweep.open_sweep(tmp_path, origin, 2, fresh=False)
    started.append(make_run(config))
    whole = started.path.read_bytes()
    started.append(make_run(config, "int8_custom"))
    for keep in (1, 15, len(whole) // 2):
        started.path.write_bytes(whole + started.path.read_bytes()[len(whole) :][:keep])
        assert [run.impl for run in sweep.read(started.path).runs.values()] == ["auto"]
        assert started.path.read_bytes() == whole
    started.path.write_bytes(whole[:20])
    with pytest.raises(ValueError, match="holds no complete run"):
        sweep.read(started.path)


@pytest.mark.parametrize(
    ("change", "num_runs", "fresh", "continues"),
    [
        ({}, 2, False, True),
        ({}, 1, False, False),
        ({}, 2, True, False),
        ({"commit": "4567"}, 2, False, False),
        ({"config_sha256": "other"}, 2, False, False),
        ({"device": "another CPU"}, 2, False, False),
    ],
    ids=["unfinished", "complete", "fresh", "other-commit", "other-config", "other-device"],
)
def test_which_sweep_goes_on(config, origin, tmp_path, monkeypatch, change, num_runs, fresh, continues):
    before = sweep.open_sweep(tmp_path, origin, 2, fresh=False)
    before.append(make_run(config))
    monkeypatch.setattr(sweep, "utc_now", lambda: "2999-01-01T00:00:00+00:00")
    after = sweep.open_sweep(tmp_path, replace(origin, **change), num_runs, fresh)
    assert (after.path == before.path) == continues
    assert bool(after.runs) == continues


def test_clean_runs_become_records(config, origin, tmp_path):
    started = sweep.open_sweep(tmp_path, origin, 2, fresh=False)
    started.append(make_run(config))
    started.append(make_run(config, "int8_custom", duration_s=1.0))
    lines, problems = summary.records(config, started)
    assert not problems
    assert [(line.impl, line.tok_per_s, line.n) for line in lines] == [("auto", 128.0, 1), ("int8_custom", 256.0, 1)]
    assert lines[1].metrics["first_token_agreement"] == 1.0
    assert lines[0].metrics["itl_ms_p50"] == 2.0
    assert lines[0].metrics["output_tokens"] == 256
    # All requests decode from 5 to 35 ms, 16 of them, a token every 2 ms.
    assert lines[0].metrics["decode_tok_per_s"] == pytest.approx(8000, rel=0.1)


def test_records_carry_the_whole_name_of_a_cache(config, origin, tmp_path):
    config = replace(config, kv_cache_dtypes=("auto", "int8_custom", K6V4))
    started = sweep.open_sweep(tmp_path, origin, 3, fresh=False)
    for impl, seconds in (("auto", 2.0), ("int8_custom", 1.0), (K6V4, 0.5)):
        started.append(make_run(config, impl, duration_s=seconds))
    lines, problems = summary.records(config, sweep.read(started.path))
    assert not problems
    assert [(line.impl, line.tok_per_s) for line in lines] == [("auto", 128.0), ("int8_custom", 256.0), (K6V4, 512.0)]
    shown = StringIO()
    Console(file=shown, width=100).print(summary.table("cpu_smoke", lines))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.getvalue().splitlines()]
    assert ["128 in, 16 out", K6V4, "512.0", "4.00x", "5", "2.0", "0 of 16"] in rows

    for line in lines:
        record.append(line, tmp_path)
    (cases,) = summary.groups("throughput", tmp_path).values()
    bars = {bar.name: bar.y for bar in figures.bar_figure(cases).data}
    assert (bars["vLLM bf16 (auto)"], bars["int8_custom"], bars[K6V4]) == ((128.0,), (256.0,), (512.0,))


def test_a_cache_that_was_not_measured_in_every_case_leaves_gaps(config, origin, tmp_path):
    started = sweep.open_sweep(tmp_path, origin, 3, fresh=False)
    for impl in ("auto", K6V4):
        started.append(make_run(config, impl))
    lines, _ = summary.records(replace(config, kv_cache_dtypes=("auto", K6V4)), started)
    two, four, eight = ([replace(line, case=line.case | {"max_concurrency": n}) for line in lines] for n in (2, 4, 8))
    cases = [{line.impl: line for line in group} for group in (two, four[:1], eight[:1])]
    rates = {curve.name: curve.y for curve in figures.flight_figure(cases).data}
    assert rates["vLLM bf16 (auto)"] == (128.0, 128.0, 128.0)
    assert rates[K6V4] == (128.0, None, None)


@pytest.mark.parametrize(
    ("impl", "name"),
    [
        ("auto", "vLLM bf16 (auto)"),
        ("fp8", "vLLM fp8"),
        ("fp8:block_size=64", "vLLM fp8:block_size=64"),
        ("int8_custom", "int8_custom"),
        (K6V4, K6V4),
    ],
)
def test_what_tables_call_a_cache(impl, name):
    assert summary.label(impl) == name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda run: run.rows.pop(), "15 requests instead of 16"),
        (lambda run: setattr(run.rows[0], "error", "x"), "1 of 16 requests failed"),
        (lambda run: setattr(run.rows[0], "output_tokens", 15), "1 requests without 16 output tokens"),
        (lambda run: run.lost.append("replica 1 (a): it died"), "lost replica 1 (a): it died; 0 requests were"),
        (lambda run: [setattr(row, "first_token", -1) for row in run.rows], "0% of the first tokens are those of auto"),
        (lambda run: setattr(run, "round", 1), "1 of 1 rounds"),
    ],
    ids=["missing", "failed", "short", "lost", "wrong", "round"],
)
def test_what_is_wrong_becomes_no_record(config, origin, tmp_path, change, problem):
    started = sweep.open_sweep(tmp_path, origin, 2, fresh=False)
    started.append(make_run(config))
    wrong = make_run(config, "int8_custom")
    change(wrong)
    started.append(wrong)
    if problem == "1 of 1 rounds":
        config = replace(config, rounds=2)
        problem = "1 of 2 rounds"
    lines, problems = summary.records(config, started)
    assert any(problem in text for text in problems), problems
    assert "int8_custom" not in [line.impl for line in lines]


def test_committed_records_equal_their_requests():
    """Nothing is lost or counted twice between the rows and the records."""
    lines = [*record.read("throughput"), *record.read("online")]
    assert lines
    for line in lines:
        found = sweep.read(RESULTS / line.metrics["requests_file"])
        runs = [run for run in found.runs.values() if run.impl == line.impl and run.case.items() <= line.case.items()]
        assert len(runs) == line.n
        assert all(len({row.request_id for row in run.rows}) == line.metrics["num_requests"] for run in runs)
        rates = [round(run.output_tok_per_s, 2) for run in runs]
        assert json.dumps(rates) == json.dumps(line.metrics["output_tok_per_s_by_round"])
        assert found.origin.commit == line.commit

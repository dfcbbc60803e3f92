"""What demo and eval show while they wait for engines, and what arrives of an engine that ends early."""

import io
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from vllm_int8kv.evaluation import progress
from vllm_int8kv.evaluation.engines.process import EngineError, run_engine

STAGES = {"load": 1, "decode": 3, "needle": 4}
PLAN = {"kv_cache_dtype": "auto", "dtype": "float32"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, for the module."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_when_a_stage_begins_and_ends(clock):
    shown = io.StringIO()
    with progress.ProgressDisplay(Console(file=shown)) as display, display.engine("auto", STAGES) as stages:
        assert shown.getvalue() == "auto: load ...\n", "before the engine says anything"
        stages.update("load", 0.0)
        clock[0] += 12
        stages.update("load", 1.0)
        stages.update("decode", 0.5)
        clock[0] += 75
        stages.update("needle", 0.5)
        clock[0] += 1
    lines = ["auto: load ...", "auto: load, 12 s", "auto: decode ...", "auto: decode, 75 s"]
    assert shown.getvalue().splitlines() == [*lines, "auto: needle ...", "auto: needle, 1 s"]


def test_nothing_is_said_after_an_error(clock):
    shown = io.StringIO()
    display = progress.ProgressDisplay(Console(file=shown))
    with pytest.raises(EngineError), display, display.engine("auto", STAGES):
        raise EngineError
    assert shown.getvalue() == "auto: load ...\n"


def test_a_terminal_gets_bars():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, force_interactive=True, width=120)
    with progress.ProgressDisplay(console) as display, display.engine("auto", STAGES) as stages:
        stages.update("load", 1.0)
    assert "auto: load ..." not in shown.getvalue()
    assert "━" in shown.getvalue() and "auto" in shown.getvalue()


def test_nothing_is_shown_beside_the_logs_of_engines():
    shown = io.StringIO()
    display = progress.ProgressDisplay(Console(file=shown), is_hidden=True)
    with display, display.engine("auto", STAGES) as stages:
        stages.update("decode", 1.0)
    assert shown.getvalue() == ""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module that stands for an engine, and returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code: str) -> str:
        head = "import json, sys\nfrom vllm_int8kv.evaluation.engines.process import emit, refuse\n"
        (tmp_path / "fake_engine.py").write_text(head + textwrap.dedent(code))
        return "fake_engine"

    return write


def test_progress_and_result_of_an_engine(engine):
    module = engine("""
        plan = json.load(sys.stdin)
        emit(stage="load", done=0.5)
        print("a line of the log")
        emit(result={"answer": plan["dtype"]})
    """)
    seen = []
    assert run_engine(module, PLAN, lambda *event: seen.append(event)) == {"answer": "float32"}
    assert seen == [("load", 0.5)]


def test_an_engine_that_refuses_its_plan(engine):
    module = engine("json.load(sys.stdin); refuse('--text: note.txt is too short')")
    with pytest.raises(ValueError, match=r"^--text: note\.txt is too short$"):
        run_engine(module, PLAN, lambda *event: None)


@pytest.mark.parametrize("text", ["", "long" * 100_000], ids=["short plan", "plan longer than a pipe holds"])
def test_an_engine_that_dies_before_it_reads_its_plan(engine, text):
    module = engine("raise ImportError('no vLLM here')")
    with pytest.raises(EngineError, match="ended with exit code 1") as error:
        run_engine(module, PLAN | {"text": text}, lambda *event: None)
    assert error.value.last_line == "ImportError: no vLLM here"

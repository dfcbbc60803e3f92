"""The calls of a first run on a GPU: limits, logs, what travels, and one from end to end with a stub GPU."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from stub_gpu import StubGpu
from typer.testing import CliRunner

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import calls, idle, parts
from benchmarks.gpu.calls import CALLS, Machine
from benchmarks.gpu.parts import DamagedError, Manifest, Part
from benchmarks.gpu.steps import BusyError, Status, Step, run_call
from benchmarks.operators import cases
from benchmarks.processes import run_group
from vllm_int8kv.evaluation import record

ROOT = Path(gpu.__file__).resolve().parents[2]
LEASE_SECONDS = 15 * 60
START_SECONDS = 60
MAX_CALL_SECONDS = 600
NUM_PARTS = 4
"""Of the real packages, at most."""
CHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={own_session})
print("child", child.pid, flush=True)
{then}
"""
"""A program that starts another, in its own group or in a new one."""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run_steps(steps, out, seconds=60.0, environment=None, wait=lambda: None):
    return run_call("call", steps, out, seconds, environment or {}, wait, "0123456789ab")


def child_of(log: Path) -> int | None:
    """The process that `CHILD` names, once it does."""
    found = re.search(r"^child (\d+)$", log.read_text(), flags=re.MULTILINE) if log.is_file() else None
    return int(found[1]) if found else None


def assert_ends(pid: int) -> None:
    end = time.monotonic() + 120
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, f"{pid} goes on"
        time.sleep(0.05)


def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path):
    steps = [
        Step("fails", python("raise SystemExit(3)"), 20),
        Step("hangs", python("import time; print('before', flush=True); time.sleep(60)"), 2),
        Step("is missing", ["no-such-program"], 20),
        Step("works", python("import os; print('said', os.environ['HELLO'])"), 20, environment={"HELLO": "world"}),
    ]
    outcomes = run_steps(steps, tmp_path, environment={"HELLO": "nobody"})
    statuses = [outcome.status for outcome in outcomes]
    assert statuses == [Status.failed, Status.stopped, Status.failed, Status.passed]
    assert [outcome.detail for outcome in outcomes[:2]] == ["with 3", "after 2 s"]
    lines = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert [(line["step"], line["status"], line["commit"]) for line in lines] == [
        (step.name, status, "0123456789ab") for step, status in zip(steps, statuses, strict=True)
    ]
    assert all(0 <= line["seconds"] < 20 for line in lines)
    log = (tmp_path / "call.log").read_text()
    positions = [
        log.index(text) for text in ("=== fails", "=== hangs", "before", "was stopped", "=== works", "said world")
    ]
    assert positions == sorted(positions)


def test_a_call_ends_at_its_limit_and_names_what_is_left_out(tmp_path):
    steps = [Step(name, python("import time; time.sleep(60)"), 60) for name in ("long", "late")]
    started = time.monotonic()
    outcomes = run_steps(steps, tmp_path, seconds=2)
    assert time.monotonic() - started < 50
    assert [outcome.status for outcome in outcomes] == [Status.stopped, Status.skipped]
    assert outcomes[1].detail == "no time left"


@pytest.mark.parametrize("own_session", [False, True], ids=["same-group", "own-session"])
def test_nothing_is_left_of_a_program_at_its_limit(tmp_path, own_session):
    code = CHILD.format(own_session=own_session, then="time.sleep(600)")
    with (tmp_path / "log").open("wb") as log, pytest.raises(subprocess.TimeoutExpired):
        run_group(python(code), log, {}, 6)
    assert_ends(child_of(tmp_path / "log"))


def test_nothing_is_left_of_a_program_that_ends(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        assert run_group(python(CHILD.format(own_session=False, then="sys.exit(5)")), log, {}) == 5
    assert_ends(child_of(tmp_path / "log"))


def test_a_call_that_is_told_to_end_takes_its_step_along(tmp_path):
    code = CHILD.format(own_session=False, then="time.sleep(600)")
    program = (
        "from pathlib import Path\nfrom benchmarks.gpu.steps import Step, run_call\n"
        f"run_call('call', [Step('step', {python(code)!r}, 600)], Path({str(tmp_path)!r}), 600, {{}}, lambda: None)"
    )
    process = subprocess.Popen(python(program), cwd=ROOT)
    end = time.monotonic() + 120
    while not child_of(tmp_path / "call.log"):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert_ends(child_of(tmp_path / "call.log"))


def test_timings_wait_for_an_idle_gpu(tmp_path, monkeypatch):
    environment = StubGpu(tmp_path / "bin").environment(busy_looks=2)
    monkeypatch.setenv("PATH", environment["PATH"])
    assert idle.uses() == "processes 4711, another program"
    idle.wait_until_idle(seconds=30, interval=0.01)
    assert (tmp_path / "bin" / "busy_looks").read_text().strip() == "0"
    (tmp_path / "bin" / "busy_looks").write_text("1000000")
    with pytest.raises(BusyError, match="the GPU is not idle: processes 4711"):
        idle.wait_until_idle(seconds=0.05, interval=0.01)


def test_without_an_idle_gpu_nothing_is_timed_and_the_rest_runs(tmp_path):
    def wait():
        raise BusyError("the GPU is not idle: utilization of 93 %")

    steps = [Step("timing", python("pass"), 20, is_timing=True), Step("check", python("pass"), 20)]
    outcomes = run_steps(steps, tmp_path, wait=wait)
    assert [(outcome.status, outcome.detail) for outcome in outcomes] == [
        (Status.skipped, "the GPU is not idle: utilization of 93 %"),
        (Status.passed, ""),
    ]


def test_a_gpu_that_does_not_answer_is_not_idle(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BusyError, match="whether the GPU is idle is not known"):
        idle.wait_until_idle(seconds=1)


LIMIT = 1 << 20


@pytest.fixture
def tree(tmp_path):
    """A folder of which most does not get smaller, with an executable and a link."""
    folder = tmp_path / "tree"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "random").write_bytes(os.urandom(5 * LIMIT // 2))
    (folder / "package" / "zeros").write_bytes(bytes(LIMIT))
    (folder / "tool").write_text("#!/bin/sh\n")
    (folder / "tool").chmod(0o755)
    (folder / "link").symlink_to("tool")
    return folder


def test_a_folder_comes_back_from_its_parts(tmp_path, tree):
    sent = tmp_path / "sent"
    cut = parts.cut(tree, sent, LIMIT)
    assert len(cut) >= 3 and all(part.num_bytes <= LIMIT for part in cut)
    assert min(part.num_bytes for part in cut[:-1]) > 0.7 * LIMIT
    assert sorted(path.name for path in sent.iterdir()) == [part.name for part in cut]
    Manifest("0123456789ab", cut).save(sent)
    assert Manifest.load(sent) == Manifest("0123456789ab", cut)
    store = tmp_path / "store"
    for part in reversed(cut):  # in any order
        parts.receive(part, sent, store)
    parts.join(cut, store, tmp_path / "back")
    assert subprocess.run(["diff", "-r", tree, tmp_path / "back"]).returncode == 0
    assert os.access(tmp_path / "back" / "tool", os.X_OK) and (tmp_path / "back" / "link").is_symlink()
    assert list(store.iterdir()) == []


def test_parts_that_are_missing_or_damaged_are_named(tmp_path, tree):
    sent, store = tmp_path / "sent", tmp_path / "store"
    cut = parts.cut(tree, sent, LIMIT)
    parts.receive(cut[0], sent, store)
    with pytest.raises(DamagedError, match=r"not received: part-01, part-02"):
        parts.join(cut, store, tmp_path / "back")
    damaged = sent / cut[1].name
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(DamagedError, match=r"part-01\.xz is not the file that the manifest names"):
        parts.receive(cut[1], sent, store)
    damaged.unlink()
    with pytest.raises(DamagedError, match=r"part-01\.xz is not there"):
        parts.receive(cut[1], sent, store)


def machine(tmp_path: Path, device: str, num_parts: int = 0) -> Machine:
    cut = [Part(f"part-{number:02}.xz", 1, "") for number in range(num_parts)]
    Manifest("fedcba987654", cut).save(tmp_path / "kit")
    return Machine(device, tmp_path / "kit", tmp_path / "store", tmp_path / "out")


def steps_of(on: Machine) -> dict[tuple[str, int | None], list[Step]]:
    return {
        (name, number): CALLS[name].steps(on, *([] if number is None else [number]))
        for name, number, _ in gpu.schedule(on.kit)
    }


def test_the_calls_fit_into_a_quarter_of_an_hour(tmp_path):
    on = machine(tmp_path, "cuda", NUM_PARTS)
    names = [name for name, _ in steps_of(on)]
    assert names == ["kernels", *["part"] * NUM_PARTS, "answers", "engines", "operators", "ladder"]
    assert sum(CALLS[name].seconds for name in names) <= LEASE_SECONDS - START_SECONDS
    for name, found in steps_of(on).items():
        limit = CALLS[name[0]].seconds
        assert limit < MAX_CALL_SECONDS and all(step.seconds <= limit for step in found), name


def test_what_measures_waits_and_writes_where_records_come_back(tmp_path):
    on = machine(tmp_path, "cuda", NUM_PARTS)
    measuring = [step for found in steps_of(on).values() for step in found if "--device" in step.command]
    assert len(measuring) == NUM_PARTS + 3
    for step in measuring:
        assert step.is_timing, step.name
        assert step.command[step.command.index("--out") + 1] == str(on.out)
        module = step.command[2].replace(".", "/")
        assert (ROOT / module / "__main__.py").is_file()
    quantize = steps_of(on)["ladder", None][0].command
    assert quantize[quantize.index("--errors") + 1] == "none"


def test_each_part_brings_other_timings_of_shapes_that_exist(tmp_path):
    on = machine(tmp_path, "cuda", NUM_PARTS)
    commands = [calls.part(on, number)[1].command for number in range(NUM_PARTS)]
    assert len({tuple(command) for command in commands}) == NUM_PARTS
    found = cases.choose_cases(record.Device.cuda, quick=False, first_model=True)
    for command in commands:
        options = dict(pairwise(command))
        size = options.get("--block-size")
        assert [c for c in found if c.what == options["--only"] and size in (None, str(c.shape.block_size))], command


def test_engines_answer_in_the_order_of_what_is_worth_knowing(tmp_path):
    found = {step.name: step for step in steps_of(machine(tmp_path, "cuda"))["answers", None]}
    assert list(found) == ["model", "V2-graphs", "V2-eager", "V1-graphs", "V1-eager", "auto"]
    assert [found[name].environment for name in ("V2-graphs", "V1-eager")] == [
        {"VLLM_USE_V2_MODEL_RUNNER": "1"},
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
    ]
    for name, step in found.items():
        assert ("--enforce-eager" in step.command) == (name.endswith("eager") or name == "auto"), name
    with_parts = [step.name for step in steps_of(machine(tmp_path, "cuda", 1))["answers", None]]
    assert with_parts[:2] == ["unpack", "compile"]


def test_both_devices_have_the_same_steps(tmp_path):
    on_gpu, on_cpu = (steps_of(machine(tmp_path, device, 2)) for device in ("cuda", "cpu"))
    for call, found in on_gpu.items():
        assert [step.name for step in found if step.name != "gpu"] == [step.name for step in on_cpu[call]]


def test_steps_find_the_packages_that_were_brought_and_name_the_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("INT8KV_COMMIT", raising=False)
    on = machine(tmp_path, "cuda")
    environment = on.environment()
    assert environment["INT8KV_COMMIT"] == "fedcba987654"
    assert environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0"
    (on.site / "brought").mkdir(parents=True)
    (on.site / "brought" / "__init__.py").touch()
    code = "import brought, benchmarks.gpu"
    assert subprocess.run(python(code), cwd=tmp_path, env=os.environ | environment).returncode == 0
    monkeypatch.setenv("INT8KV_COMMIT", "0123456789ab")
    assert on.environment()["INT8KV_COMMIT"] == "0123456789ab"
    (on.kit / parts.MANIFEST).unlink()
    monkeypatch.delenv("INT8KV_COMMIT")
    assert on.commit() is None and "INT8KV_COMMIT" not in on.environment()


def test_without_a_gpu_the_command_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/nowhere")
    done = CliRunner().invoke(gpu.app, ["run", "ladder", "--out", str(tmp_path)])
    assert done.exit_code == 1 and "needs an NVIDIA GPU" in str(done.exception or done.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "is no call"), (["part"], "takes --number"), (["ladder", "--number", "1"], "takes --number")],
)
def test_calls_that_do_not_exist_are_refused(arguments, message):
    done = CliRunner().invoke(gpu.app, ["run", *arguments])
    assert done.exit_code == 2 and message in done.output


def test_a_call_runs_from_end_to_end_with_a_stub_gpu(tmp_path):
    """The shortest that measures; `make gpu-dry-run` runs all."""
    on = machine(tmp_path, "cpu")
    environment = StubGpu(tmp_path / "bin").environment(busy_looks=1) | {"OUT": str(on.out)}
    command = [sys.executable, "-m", "benchmarks.gpu", "run", "ladder", "--device", "cpu"]
    command += ["--kit", str(on.kit), "--store", str(on.store)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (on.out / "ladder.log").read_text()
    assert "ladder: passed" in done.stdout
    assert {path.name for path in on.out.iterdir()} == {"ladder.log", "summary.jsonl", "quantize.jsonl"}
    assert "timings, 0 shapes failed" in (on.out / "ladder.log").read_text()


def test_records_that_came_back_are_collected(tmp_path):
    line = (ROOT / "benchmarks" / "results" / "read_bandwidth.jsonl").read_text().splitlines()[0]
    came, results = tmp_path / "came", tmp_path / "results"
    for number in range(2):
        (came / f"part-{number}").mkdir(parents=True)
        (came / f"part-{number}" / "read_bandwidth.jsonl").write_text(line + "\n")
        (came / f"part-{number}" / "summary.jsonl").write_text("{}\n")
    command = ["collect", str(came), "--results", str(results)]
    done = CliRunner().invoke(gpu.app, command)
    assert done.exit_code == 0 and "2 records of 2 files" in done.output
    assert len(record.read("read_bandwidth", results)) == 2 and len(list(results.iterdir())) == 1
    (came / "part-1" / "read_bandwidth.jsonl").write_text(line[:-20])
    assert CliRunner().invoke(gpu.app, command).exit_code == 1
    assert len(record.read("read_bandwidth", results)) == 2


def test_the_stub_tools_run_what_they_are_given(tmp_path, monkeypatch):
    """The steps of a call run them with the options of the real ones."""
    monkeypatch.setenv("PATH", StubGpu(tmp_path / "bin").environment()["PATH"])
    on = machine(tmp_path, "cuda")
    on.out.mkdir()
    shutil.copy("/bin/echo", tmp_path / "echo")
    wrapped = [step for step in calls.kernels(on) if step.name in calls.TOOLS or step.name.startswith("ncu")]
    assert len(wrapped) == 7
    for step in wrapped:
        driver = str(on.kit / calls.KERNELS / calls.DRIVER)
        command = [str(tmp_path / "echo") if word == driver else word for word in step.command]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "stands in for" in done.stdout, step.name
    assert len(list(on.out.glob("ncu-*.csv"))) == 3

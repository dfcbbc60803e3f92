"""The test run itself: nothing that it starts outlives it, and it waits for what makes progress."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import hear_sigint, wait_for

HELPERS = Path(__file__).parent / "helpers"
ENDS_WITHIN = 60.0
"""Seconds; the watchdog takes less than one on an idle machine."""
SLEEP = "import time; time.sleep(600)"
TITLED = "import time, setproctitle; setproctitle.setproctitle('VLLM::EngineCore'); time.sleep(600)"
"""Overwrites its environment, as vLLM's processes do."""
FORKED = "import os, time; os.fork() or os.setsid(); time.sleep(600)"

CONFTEST = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
import run_watchdog

def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.watchdog = run_watchdog.start()
"""
TEST = """
import multiprocessing, pathlib, subprocess, sys, time

def start(code):
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True).pid

def test_that_never_ends():
    pids = [start(code) for code in CODES]
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=[600])
    child.start()
    time.sleep(3)  # the watchdog looks once a second
    pathlib.Path(FILE).write_text(" ".join(map(str, [*pids, child.pid])))
    time.sleep(600)
"""


def ended(processes: list[psutil.Process]) -> bool:
    """Whether all have; nobody may be there to ask a killed one for its exit code."""
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("workers", ["0", "1"], ids=["one process", "xdist"])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=lambda sent: sent.name)
def test_what_a_run_has_started_ends_with_it(tmp_path, workers, sent):
    """Processes in sessions of their own: plain, named as vLLM names its own, and with a forked child."""
    pids_file = tmp_path / "pids.txt"
    (tmp_path / "conftest.py").write_text(CONFTEST)
    codes = [SLEEP, TITLED, FORKED]
    (tmp_path / "test_it.py").write_text(f"CODES, FILE = {codes!r}, {str(pids_file)!r}\n{TEST}")
    bystander = subprocess.Popen([sys.executable, "-c", SLEEP])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, str(tmp_path)]
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        output = {"stdout": file, "stderr": subprocess.STDOUT}
        run = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=hear_sigint, **output)
    try:
        wait_for(run, log, pids_file.exists, interval=0.1)
        started = [psutil.Process(int(pid)) for pid in pids_file.read_text().split()]
        started += [child for process in started for child in process.children()]
        assert len(started) == 5 and not ended(started)
        os.killpg(run.pid, sent) if sent == signal.SIGINT else run.kill()
        run.wait(ENDS_WITHIN)
        deadline = time.monotonic() + ENDS_WITHIN
        while not ended(started) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ended(started), [process for process in started if process.is_running()]
        assert bystander.poll() is None
    finally:
        run.kill()
        bystander.kill()
        bystander.wait()


def test_waiting_lasts_as_long_as_something_moves(tmp_path):
    """Three times as long as it may stand still: it writes, then it computes."""
    log = tmp_path / "log.txt"
    code = """
import sys, time
for _ in range(6):
    print("a line", flush=True)
    time.sleep(0.5)
until = time.process_time() + 3
while time.process_time() < until:
    pass
open(sys.argv[1], "w").close()
time.sleep(600)
"""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "ready")], stdout=file)
    try:
        wait_for(process, log, (tmp_path / "ready").exists, stalled_seconds=10, interval=0.1)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit('no memory')", r"the process ended with exit code 1:\nno memory"),
        ("print('waiting', flush=True); import time; time.sleep(600)", r"no progress for 2 s:\nwaiting"),
    ],
    ids=["ended", "stands still"],
)
def test_waiting_ends_when_nothing_moves(tmp_path, code, message):
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=subprocess.STDOUT)
    try:
        with pytest.raises(RuntimeError, match=message):
            wait_for(process, log, lambda: False, stalled_seconds=2, interval=0.1)
    finally:
        process.kill()
        process.wait()

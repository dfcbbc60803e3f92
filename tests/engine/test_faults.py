"""What breaks from outside: full disks, killed conversions, killed engines. Nothing half-written is believed."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import tiny_models
from engines import greedy_tokens, tiny_exact_engine
from processes import hear_sigint, wait_for

from vllm_int8kv.commands import models

ROOT = Path(__file__).resolve().parents[2]

FULL_DISK = """
import resource, signal, sys
from dataclasses import replace
from pathlib import Path
from vllm_int8kv.evaluation import record
line = record.read("decode")[0]
folder = Path({folder!r})
record.append(line, folder)
size = (folder / "decode.jsonl").stat().st_size
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    record.append(line, folder)
except OSError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
record.append(line, folder)
print(len(record.read("decode", folder)))
"""


def test_a_record_is_written_whole_or_not_at_all(tmp_path):
    code = FULL_DISK.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused: [Errno 27] File too large", "2"]


def slow_convert(gguf: Path, folder: Path) -> None:
    for index in range(8):
        folder.joinpath(f"part-{index}").write_bytes(bytes(1000))
        time.sleep(0.02)
    folder.joinpath("config.json").write_text("{}")


def convert_slowly() -> None:
    models._convert = slow_convert
    models.smollm2()


def test_a_conversion_killed_at_any_moment_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_convert", slow_convert)
    context = multiprocessing.get_context("fork")
    for moment in range(10):
        child = context.Process(target=convert_slowly)
        child.start()
        time.sleep(0.03 * moment)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        for folder in models.cache_dir().glob("smollm2-*[!.partial]"):
            assert not folder.is_dir() or folder.suffix or models.is_intact(folder)
    assert models.is_intact(models.smollm2())


def test_a_conversion_onto_a_full_disk_says_so(tmp_path, monkeypatch):
    def full(gguf: Path, folder: Path) -> None:
        folder.joinpath("config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_convert", full)
    with pytest.raises(OSError, match="No space left"):
        models.smollm2()
    monkeypatch.setattr(models, "_convert", slow_convert)
    assert models.is_intact(models.smollm2())


@pytest.mark.engine
def test_a_killed_worker_ends_requests_with_an_error_and_the_next_engine_works(tmp_path):
    from vllm.v1.engine.exceptions import EngineDeadError

    model = tiny_models.llama(tmp_path)

    def kill_workers() -> None:
        for child in psutil.Process().children(recursive=True):
            if "Worker" in child.name() or "Worker" in " ".join(child.cmdline()):
                child.kill()

    with tiny_exact_engine(model, own_process=True) as llm:
        timer = threading.Timer(0.3, kill_workers)
        timer.start()
        with pytest.raises(EngineDeadError):
            for _ in range(100):
                greedy_tokens(llm, max_tokens=100)
        timer.join()
    with tiny_exact_engine(model) as llm:
        assert len(greedy_tokens(llm)) == 4


DEMO = [sys.executable, "-m", "vllm_int8kv.commands.cli", "demo"]
LOADED_CPU_SECONDS = 12
"""By then an engine is past most of its imports, and loads or answers."""


def engines(demo: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in demo.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            if "vllm_int8kv.evaluation.engines.demo_engine" in child.cmdline():
                found.append(child)
    return found


@pytest.mark.engine
def test_a_demo_interrupted_at_any_moment_ends_and_starts_again(tmp_path):
    """Each run gets further than the one before, so each shows that the one before has spoilt nothing."""
    log = tmp_path / "log.txt"

    def converting(demo: psutil.Process) -> bool:
        return bool(list(tmp_path.glob("vllm-int8kv/*.partial")))

    def starting(demo: psutil.Process) -> bool:
        return bool(engines(demo))

    def running(demo: psutil.Process) -> bool:
        return any(engine.cpu_times().user > LOADED_CPU_SECONDS for engine in engines(demo))

    def like_a_terminal(demo: psutil.Process) -> None:
        os.killpg(demo.pid, signal.SIGINT)

    # Ctrl-C goes to all processes of the terminal; `kill` and container runtimes only hit the first.
    moments = [(converting, like_a_terminal, 130), (starting, like_a_terminal, 130)]
    moments += [(running, like_a_terminal, 130), (starting, psutil.Process.terminate, -signal.SIGTERM)]
    for has_come, interrupt, expected in moments:
        with log.open("w") as file:
            options = {"env": os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, "preexec_fn": hear_sigint}
            process = subprocess.Popen(DEMO, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **options)
        demo = psutil.Process(process.pid)
        try:
            wait_for(process, log, partial(has_come, demo), interval=0.05)
            left = engines(demo)
            interrupt(demo)
            assert process.wait(20) == expected, log.read_text()[-3000:]
            assert "Traceback" not in log.read_text()
            assert not psutil.wait_procs(left, timeout=20)[1], "an engine goes on"
        finally:
            process.kill()
    (folder,) = (path for path in tmp_path.glob("vllm-int8kv/*") if path.is_dir())
    assert models.is_intact(folder)

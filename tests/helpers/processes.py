"""Processes that tests start."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

STALLED_SECONDS = 120.0
STALLED_CPU_SECONDS = 1.0
"""What the processes of a server compute at least while it starts, of which a busy machine takes its time; polling
sockets takes less."""


def hear_sigint() -> None:
    """For `subprocess.Popen(preexec_fn=...)`: a suite in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tree(pid: int) -> list[psutil.Process]:
    """A process and what it has started, as far as it lives."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill_tree(process: subprocess.Popen) -> None:
    """End a process and what it has started, unless it has ended by itself."""
    for member in tree(process.pid) if process.poll() is None else ():
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def cpu_seconds(pid: int) -> float:
    """What a process and its children have computed, those that have ended included."""
    total = 0.0
    for process in tree(pid):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # user, system, and both of ended children
    return total


def wait_for(
    process: subprocess.Popen,
    log: Path,
    has_come: Callable[[], bool],
    stalled_seconds: float = STALLED_SECONDS,
    interval: float = 0.5,
) -> None:
    """Wait until `has_come` says so, for as long as the process makes progress: on a busy machine that may be long.

    Raises:
        RuntimeError: the process has ended, or neither its log grew nor did it or its children compute for
            `stalled_seconds`; with the end of the log.
    """
    size, computed, since = -1, 0.0, time.monotonic()
    while True:
        if process.poll() is not None:
            raise RuntimeError(f"the process ended with exit code {process.returncode}:\n{_tail(log)}")
        if has_come():
            return
        new_size, new_computed = log.stat().st_size, cpu_seconds(process.pid)
        if new_size != size or abs(new_computed - computed) >= STALLED_CPU_SECONDS:
            size, computed, since = new_size, new_computed, time.monotonic()
        elif time.monotonic() - since > stalled_seconds:
            raise RuntimeError(f"the process has made no progress for {stalled_seconds:g} s:\n{_tail(log)}")
        time.sleep(interval)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]

"""Runs programs of which nothing is left afterwards, with a time limit and their output in a file."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import psutil


def run_group(
    command: list[str],
    log: BinaryIO,
    environment: Mapping[str, str],
    seconds: float | None = None,
    cwd: Path | None = None,
) -> int:
    """Run a command in a process group of its own and end the group with it.

    Args:
        log: gets all output. No pipe: what was written before a limit is there afterwards.
        environment: of the command, beside that of this process.

    Returns:
        Its exit status.

    Raises:
        subprocess.TimeoutExpired: it was killed after `seconds`.
        OSError: it could not be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=os.environ | environment,
        start_new_session=True,
    )
    strays: list[psutil.Process] = []
    try:
        return process.wait(seconds)
    except BaseException:
        # Some have made groups of their own; who they are can be asked only as long as their parents live.
        with contextlib.suppress(psutil.Error):
            strays = psutil.Process(process.pid).children(recursive=True)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for stray in strays:
            with contextlib.suppress(psutil.Error):
                stray.kill()
        process.wait()

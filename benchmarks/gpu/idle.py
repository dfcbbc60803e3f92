"""Waits until nothing uses the GPU: a time taken beside another program says nothing."""

import subprocess
import time
from functools import partial

from benchmarks.gpu.steps import BusyError

LOOKS_IN_A_ROW = 2
"""`nvidia-smi` shows the utilization of the last moments; one look may fall between two kernels."""
query = partial(subprocess.run, check=True, capture_output=True, text=True, timeout=30)


def uses() -> str:
    """What uses the first GPU, or nothing."""
    processes = query(["nvidia-smi", "--query-compute-apps=pid,process_name", "--format=csv,noheader", "--id=0"])
    if found := processes.stdout.strip():
        return f"processes {', '.join(found.splitlines())}"
    utilization = query(["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--id=0"])
    percent = utilization.stdout.strip()
    # Some virtual machines do not know it.
    return f"utilization of {percent} %" if percent.isdigit() and int(percent) else ""


def wait_until_idle(seconds: float = 20.0, interval: float = 0.5) -> None:
    """Return once the GPU has been found idle twice.

    Raises:
        BusyError: it was not within `seconds`, or nvidia-smi does not answer.
    """
    end, idle_looks = time.monotonic() + seconds, 0
    while True:
        try:
            found = uses()
        except (OSError, subprocess.SubprocessError) as error:
            raise BusyError(f"whether the GPU is idle is not known: {error}") from error
        idle_looks = 0 if found else idle_looks + 1
        if idle_looks == LOOKS_IN_A_ROW:
            return
        if time.monotonic() > end:
            raise BusyError(f"the GPU is not idle: {found}")
        time.sleep(interval)

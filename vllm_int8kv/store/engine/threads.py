"""Threads whose operators have no threads of their own.

A thread that calls a parallel operator gets a team of OpenMP threads, which stay. With more of them than cores, GNU
OpenMP lets all teams of the process sleep between operators, the model's too: decode steps on two cores took 1.4 times
as long from the first saved block on.
"""

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

LIBTORCH = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


def run_alone(run: Callable[[], None]) -> None:
    """Run in this thread alone; other threads keep what they have."""
    torch.get_num_threads()  # at its first use in a thread PyTorch sets what follows anew
    with threadpool_limits(1, user_api="openmp"):
        # MKL, which PyTorch's builds for x86 contain, has a number of its own once `torch.set_num_threads` was called.
        # threadpoolctl would change that of all threads.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(LIBTORCH)).MKL_Set_Num_Threads_Local(1)
        run()

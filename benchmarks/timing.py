"""The only timer: interleaved implementations, cold cache, median and spread, and the machine's read bandwidth.

What is inside the timed region is one call, Python wrapper included; on a GPU several, as one
CUDA graph where vLLM replays one, and the time is that of one of them. What is outside: everything that vLLM
does once per step for all layers, the read-out of the clocks, and the choice of the next cold operands.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_int8kv.cache import library
from vllm_int8kv.evaluation.record import Timing, summarize

CallOnce = Callable[[int], object]
"""Runs an implementation once; the argument counts the calls, so that each can take other (cold) operands."""

Clock = Callable[[CallOnce, int], tuple[int, int]]
"""Runs a call with its turn; its time and its CPU time in ns."""

MIN_READ_BYTES = 512 << 20
MIN_GPU_READ_BYTES = 2 << 30
COPY = "torch.copy_"

READ_METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.amax int8": lambda buffer: buffer.amax(),
    "torch.amax int64": lambda buffer: buffer.view(torch.int64).amax(),
    "torch.sum int64": lambda buffer: buffer.view(torch.int64).sum(),
    "torch.sum float32": lambda buffer: buffer.view(torch.float32).sum(),
}
"""Reductions that touch every byte once. Which one is fastest depends on the machine and the threads."""


@dataclass(frozen=True)
class Budget:
    """When to stop timing a case: after `seconds`, but with at least and at most so many samples each."""

    seconds: float = 2.0
    min_samples: int = 9
    max_samples: int = 200
    warmup: int = 2


@dataclass(frozen=True)
class ReadBandwidth:
    """How fast this machine reads memory as a stream."""

    gb_per_s: float
    method: str
    timing: Timing


def l3_bytes() -> int:
    """Size of the largest CPU cache as Linux reports it; 64 MiB where it does not (some virtual machines)."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes), default=64 << 20)


def cache_bytes(device: str) -> int:
    """Size of the last-level cache of a device."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else l3_bytes()


def cold_copies(nbytes: int, device: str = "cpu") -> int:
    """How many operands of `nbytes` to rotate over so that each has left the last-level cache when its turn comes."""
    return math.ceil(4 * cache_bytes(device) / nbytes)


def wall_clock(call: CallOnce, turn: int) -> tuple[int, int]:
    """Run once; wall-clock time and CPU time of the process in ns."""
    cpu_before = time.process_time_ns()
    before = time.perf_counter_ns()
    call(turn)
    elapsed = time.perf_counter_ns() - before
    return elapsed, time.process_time_ns() - cpu_before


def gpu_clock(call: CallOnce, turn: int) -> tuple[int, int]:
    """Run once on the current GPU stream; time between two events around it in ns, and no CPU time."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call(turn)
    end.record()
    end.synchronize()
    return round(begin.elapsed_time(end) * 1e6), 0


class GpuGraph:
    """Several calls, one after the other, as one CUDA graph, so that what is timed is not Python: as vLLM decodes.

    Args:
        call: every one of its turns must have run before.
        turns: how many calls are captured.
    """

    def __init__(self, call: CallOnce, turns: int) -> None:
        self.call = call  # owns the tensors that the graph goes on using
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for turn in range(turns):
                call(turn)

    def __call__(self, turn: int) -> None:
        self.graph.replay()


def repeated(call: CallOnce, turns: int) -> CallOnce:
    """`turns` calls without a wait between them."""

    def run(turn: int) -> None:
        for again in range(turns):
            call(turn * turns + again)

    return run


def require_gpu() -> None:
    """Raises SystemExit unless `--device cuda` can run here."""
    if not (torch.cuda.is_available() and library.has_cuda_kernels()):
        sys.exit("--device cuda needs a GPU that PyTorch can use and a vllm-int8kv with CUDA kernels")


def interleave(
    calls: dict[str, CallOnce], budget: Budget, clock: Clock = wall_clock, repeats: int = 1
) -> dict[str, Timing]:
    """Time implementations in turn (A B C A B C ...), so that drift of the machine meets all of them alike.

    Args:
        repeats: how many times each of the calls does its work; the times are those of one.
    """
    samples: dict[str, list[int]] = {name: [] for name in calls}
    cpu_ns = dict.fromkeys(calls, 0)
    started = time.perf_counter()
    for turn in range(budget.warmup + budget.max_samples):
        timed = turn - budget.warmup
        if timed >= budget.min_samples and time.perf_counter() - started > budget.seconds:
            break
        for name, call in calls.items():
            elapsed, cpu = clock(call, turn)
            if timed >= 0:
                samples[name].append(elapsed)
                cpu_ns[name] += cpu
    return {
        name: summarize([ns / 1e3 / repeats for ns in samples[name]], cpu_ns[name] / 1e3 / repeats) for name in calls
    }


class ReadMeter:
    """Measures the streaming read bandwidth, on CPU with the current number of threads.

    The bound that everything else is compared with, so it is the fastest of several plain reads of a buffer
    many times the size of the last-level cache; on a GPU, where PyTorch's reductions may not reach it, also of a
    copy, whose bytes count twice.
    """

    def __init__(self, device: str = "cpu") -> None:
        size = MIN_READ_BYTES if device == "cpu" else MIN_GPU_READ_BYTES
        self.buffer = torch.ones(max(size, 4 * cache_bytes(device)), dtype=torch.int8, device=device)
        self.clock = wall_clock if device == "cpu" else gpu_clock
        self.methods = dict(READ_METHODS)
        if device == "cuda":
            target = torch.empty_like(self.buffer)
            self.methods[COPY] = lambda buffer: target.copy_(buffer)
        self.best: dict[int, str] = {}

    def measure(self, samples: int = 5) -> ReadBandwidth:
        """Read the buffer `samples` times, by the method that was fastest when this thread count came first."""
        threads = torch.get_num_threads()
        if threads not in self.best:
            every = {name: self._call(name) for name in self.methods}
            timings = interleave(every, Budget(seconds=0, min_samples=samples), self.clock)
            self.best[threads] = max(timings, key=lambda name: self._gb_per_s(name, timings[name]))
        method, budget = self.best[threads], Budget(seconds=0, min_samples=samples, warmup=1)
        timing = interleave({method: self._call(method)}, budget, self.clock)[method]
        return ReadBandwidth(round(self._gb_per_s(method, timing), 2), method, timing)

    def _call(self, method: str) -> CallOnce:
        read = self.methods[method]
        return lambda _: read(self.buffer)

    def _gb_per_s(self, method: str, timing: Timing) -> float:
        return self.buffer.numel() * (2 if method == COPY else 1) / timing.median_us / 1e3

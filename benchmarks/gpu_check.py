"""Everything that needs a GPU, in one command: tests, sanitizers, timings.

    python -m benchmarks.gpu_check --out /data/records

Needs PyTorch for CUDA, this checkout installed with `pip install -e .` and CUDA kernels, hypothesis, numpy, psutil,
pytest, pytest-timeout, PyYAML, rich and typer; vLLM and FlashInfer only to compare with them. Where pytest-xdist is
installed the tests run in several processes, which is four times as fast: most of their time goes to references on the
CPU. Every stage has a time limit and runs whatever became of the one before.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_int8kv.cache import library
from vllm_int8kv.evaluation import record

SANITIZER_ERROR = 99
OUR_KERNELS = "kns=int8kv"
"""What compute-sanitizer looks at: kernels whose name contains it. Its racecheck calls cuBLAS a race."""
MAX_WORKERS = 8
ENGINES = [
    *["--random-weights", "llama-3.1-8b", "--rounds", "1", "--workload", "8x1024", "--workload", "16x8192"],
    *["--engine-args", '{"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}'],
]
"""CUDA graphs as usual, but no torch.compile, which takes longer than all the rest."""
TESTS = "tests/operators"
SANITIZED = {
    "memcheck": "test_mixed_batches or test_options or test_slot_mappings or test_kv_heads or test_it_is",
    "racecheck": "test_mixed_batches and bf16",
}
"""Tests per tool of compute-sanitizer, which slows kernels down a hundred times, as pytest -k takes them."""


@dataclass(frozen=True)
class Stage:
    """A command with its time limit; only those that show correctness decide the exit status."""

    name: str
    command: list[str]
    seconds: float
    is_check: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def stages(out: Path) -> Iterator[Stage]:
    """In the order in which they are worth having if the time runs out."""
    tests = str(record.ROOT / TESTS)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    workers, one_thread = [], {}
    if find_spec("xdist") is not None:
        workers = ["-n", str(min(MAX_WORKERS, os.cpu_count() or 1))]
        one_thread = {"OMP_NUM_THREADS": "1"}  # each would take all cores
    yield Stage("tests", [*pytest, *workers, tests], 110, environment=one_thread)
    if sanitizer := shutil.which("compute-sanitizer"):
        for tool, cases in SANITIZED.items():
            options = ["--error-exitcode", str(SANITIZER_ERROR), "--target-processes", "all"]
            checked = [sanitizer, "--tool", tool, "--kernel-regex", OUR_KERNELS, *options]
            yield Stage(tool, [*checked, *pytest, "-x", "-k", cases, tests], 40)
    measured = [("operators", 120, []), ("ladder", 60, [])]
    if find_spec("vllm") is not None:
        measured.append(("engines", 160, ENGINES))
    for name, seconds, options in measured:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device", "cuda", "--out", str(out), *options]
        yield Stage(name, command, seconds, is_check=False)


def run(stage: Stage) -> str:
    """What became of a stage: passed, failed or out of time."""
    print(f"=== {stage.name}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(stage.command, timeout=stage.seconds, env=os.environ | stage.environment).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {stage.seconds:.0f} s"
    return f"{'passed' if code == 0 else f'failed with {code}'} in {time.monotonic() - start:.0f} s"


def main(
    out: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Check, then time; exit with 1 if a check did not pass."""
    if not torch.cuda.is_available():
        sys.exit("gpu_check needs an NVIDIA GPU and a PyTorch for CUDA; PyTorch sees no GPU here")
    if not library.has_cuda_kernels():
        sys.exit("vllm-int8kv is installed without its CUDA kernels: build it where nvcc is found")
    results = [(stage, run(stage)) for stage in stages(out)]
    print("=== summary")
    for stage, result in results:
        print(f"{stage.name:12} {result}")
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed: memory accesses were not checked")
    sys.exit(any(stage.is_check and not result.startswith("passed") for stage, result in results))


if __name__ == "__main__":
    typer.run(main)

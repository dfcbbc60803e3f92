"""Tests of the operators on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [arguments of pytest]

PyTorch itself is not instrumented, but its allocations are: a kernel that reads or writes outside a tensor's storage
ends the run with a report. As a pytest plug-in (`-p sanitize`) this file loads the instrumented library instead of
the installed one.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
LIBRARY = BUILD / "_C.so"
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"
TESTS = [
    "test_fuzz.py",
    "test_ops_errors.py",
    "test_reshape_and_cache.py",
    "test_gather_cache.py",
    "test_int8_quant.py",
    "test_paged_attention.py",
    "test_quantize_per_channel.py",
]


def pytest_configure() -> None:
    import torch

    load = torch.ops.load_library
    torch.ops.load_library = lambda path: load(str(LIBRARY))


def build() -> None:
    configure = ["cmake", "-S", ROOT / "csrc", "-B", BUILD, "-G", "Ninja", "-DINT8KV_CUDA=OFF"]
    configure += [f"-DCMAKE_CXX_FLAGS={FLAGS}", f"-DPython_EXECUTABLE={sys.executable}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (configure, ["cmake", "--build", BUILD]):
        subprocess.run(command, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime, which must be loaded before Python's other libraries."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return str(Path(found.stdout.strip()).resolve())


def run(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run pytest on the instrumented kernels; returns its exit status."""
    build()
    environment = {
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep what they allocate
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-m", "pytest", "-p", "sanitize", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment | (variables or {})).returncode


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or ["-q", *(str(ROOT / "tests" / name) for name in TESTS)]))

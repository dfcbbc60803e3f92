"""Tests of the operators on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/builds/sanitize.py [arguments of pytest]

PyTorch itself is not instrumented, but its allocations are: a kernel that reads or writes outside a tensor's storage
ends the run with a report. Kernels that this CPU cannot run do so on emulated instructions.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from emulate_isas import HEADERS, OPTION, is_needed
from kernel_build import OPERATOR_TESTS, build, run_tests

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1"


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime, which must be loaded before Python's other libraries."""
    found = subprocess.run(["c++", f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return str(Path(found.stdout.strip()).resolve())


def run(arguments: Sequence[str], variables: Mapping[str, str] | None = None) -> int:
    """Run pytest on the instrumented kernels; returns its exit status."""
    environment = {
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep what they allocate
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    options = [f"-DCMAKE_CXX_FLAGS={FLAGS}", f"{OPTION}={HEADERS if is_needed() else ''}"]
    return run_tests(build("sanitize", *options), arguments, environment | (variables or {}))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:] or ["-q", *OPERATOR_TESTS]))

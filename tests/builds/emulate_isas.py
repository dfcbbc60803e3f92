"""Tests of the AVX-VNNI and AVX-512 kernels with emulated instructions (emulated_*.h), for CPUs without.

    python tests/builds/emulate_isas.py [arguments of pytest]

The kernels are the same but for what the compiler makes of them.
"""

import sys
from pathlib import Path

from kernel_build import OPERATOR_TESTS, build, run_tests

OPTION = "-DINT8KV_EMULATED_ISAS"
HEADERS = Path(__file__).resolve().parent
"""The value of the option: the folder of emulated_avx512.h and emulated_avx_vnni.h."""
DEFAULTS = ["-q", "-n", "2", "-k", "vnni or avx512 or test_fuzz", *OPERATOR_TESTS]


def is_needed() -> bool:
    """Whether this CPU lacks one of the instruction sets. Not by asking the operators, which would load them."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx_vnni" not in flags or "avx512_vnni" not in flags


if __name__ == "__main__":
    library = build("emulate_isas", f"{OPTION}={HEADERS}")
    sys.exit(run_tests(library, sys.argv[1:] or DEFAULTS, {"OMP_NUM_THREADS": "1"}))

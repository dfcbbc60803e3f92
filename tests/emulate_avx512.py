"""Tests of the AVX-512 kernels with emulated instructions (emulated_avx512.h), for CPUs without AVX-512.

    python tests/emulate_avx512.py [arguments of pytest]

The kernels are the same but for what the compiler makes of them.
"""

import sys

from kernel_build import ROOT, build, run_tests

EMULATED = "-DINT8KV_EMULATE_AVX512"
TESTS = [
    "test_fuzz.py",
    "test_reshape_and_cache.py",
    "test_paged_attention.py",
    "test_quantize_per_channel.py",
]
DEFAULTS = ["-q", "-n", "2", "-k", "avx512 or test_fuzz", *(str(ROOT / "tests" / name) for name in TESTS)]

if __name__ == "__main__":
    library = build("emulate_avx512", f"{EMULATED}=ON")
    sys.exit(run_tests(library, sys.argv[1:] or DEFAULTS, {"OMP_NUM_THREADS": "1"}))

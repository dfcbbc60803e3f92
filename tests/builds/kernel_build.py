"""Other builds of the CPU kernels for tests; as a pytest plug-in (`-p kernel_build`) the one named is loaded."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "INT8KV_TEST_LIBRARY"
OPERATOR_TESTS = ("tests/operators", "tests/store/test_channels.py")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before conftest.py, which imports the operators."""
    import torch

    load = torch.ops.load_library
    torch.ops.load_library = lambda path: load(os.environ[LIBRARY])


def pytest_collection_finish() -> None:
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("_C.so")}
    if loaded != {os.environ[LIBRARY]}:
        raise pytest.UsageError(f"the tests were to use {os.environ[LIBRARY]}, loaded is {', '.join(loaded) or 'none'}")


def build(name: str, *options: str) -> Path:
    """The library built in build/`name` with options of CMake."""
    folder = ROOT / "build" / name
    configure = ["cmake", "-S", ROOT / "csrc", "-B", folder, "-G", "Ninja", "-DINT8KV_CUDA=OFF"]
    configure += [*options, *shlex.split(os.environ.get("CMAKE_ARGS", "")), f"-DPython_EXECUTABLE={sys.executable}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (configure, ["cmake", "--build", folder]):
        subprocess.run(command, check=True, env=os.environ | {"PATH": path}, stdout=subprocess.DEVNULL)
    return folder / "_C.so"


def run_tests(library: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    """Run pytest with `library` in place of the installed one; returns its exit status."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent), LIBRARY: str(library)} | variables
    command = [sys.executable, "-m", "pytest", "-p", "kernel_build", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode

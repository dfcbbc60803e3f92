"""Fixtures of all tests: seeds, devices and CPU kernel paths."""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import emulated_cuda
import pytest
import run_watchdog
import torch
from support import Recorder

from vllm_int8kv.cache import library

# `benchmarks` is part of the repository and of no package. Last, so that an installed `vllm_int8kv` comes first.
sys.path.append(str(Path(__file__).resolve().parents[1]))

CPU_ISAS = ["scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni"]
NO_CUDA = "GPU case: "
ENGINE_TIMEOUT = 1800
"""Seconds for a test that starts engines, in place of `timeout` in pyproject.toml: on a busy machine they start slowly,
and where they stand still the test sees it (`helpers/processes.py`)."""
WATCHDOG = pytest.StashKey()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _require_cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip(f"{NO_CUDA}no GPU")
    if not library.has_cuda_kernels():
        pytest.skip(f"{NO_CUDA}built without CUDA kernels")
    return "cuda"


@pytest.fixture
def cuda() -> str:
    """For what only a GPU does."""
    return _require_cuda()


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every device, the CPU by the kernel path it takes by default."""
    return _require_cuda() if request.param == "cuda" else "cpu"


@pytest.fixture
def set_num_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[*CPU_ISAS, "cuda"])
def kernel(request: pytest.FixtureRequest, set_num_threads: Callable[[int], None]) -> Iterator[str]:
    """The device of every kernel there is: each CPU path and CUDA.

    On one thread, unless a test says otherwise: no result depends on it, and the threads of many small
    operators would mostly wait for one another, on a busy machine for whole time slices.
    """
    set_num_threads(1)
    if request.param == "cuda":
        yield _require_cuda()
        return
    if request.param not in library.cpu_isas():
        pytest.skip(f"this CPU has no {request.param}")
    before = library.cpu_isa()
    library.set_cpu_isa(request.param)
    assert library.cpu_isa() == request.param
    yield "cpu"
    library.set_cpu_isa(before)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> ctypes.CDLL:
    """The CUDA kernels compiled for the host, see `emulated_cuda`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation needs g++ for its 16-bit floats")
    return emulated_cuda.build(
        compiler, tmp_path_factory.mktemp("emulated_cuda"), emulated_cuda.formats_of(pytestconfig)
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    num_gpu = sum(NO_CUDA in str(report.longrepr) for report in skipped)
    terminalreporter.write_line(f"{num_gpu} GPU cases skipped")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU, so that `-m cuda` selects it; files that start engines first for several workers.

    They take longest, and a worker that began one last would leave the others idle.
    """
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(ENGINE_TIMEOUT))
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "cuda" in item.fixturenames or "cuda" in [x for x in parameters if isinstance(x, str)]:
            item.add_marker("cuda")
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = {item.path for item in items if item.get_closest_marker("engine")}
        items.sort(key=lambda item: item.path not in long)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-formats", action="store_true", help="emulate the CUDA attention of all cache formats")
    parser.addoption("--write-support", action="store_true", help="record the tests' support table when they passed")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the workers of xdist are processes of the run themselves
        config.stash[WATCHDOG] = run_watchdog.start()
    if config.getoption("--write-support"):
        if getattr(config.option, "numprocesses", None) or "PYTEST_XDIST_WORKER" in os.environ:
            raise pytest.UsageError("--write-support needs one process, which sees all tests: leave out -n")
        config.pluginmanager.register(Recorder())

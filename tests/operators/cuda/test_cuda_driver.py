"""`cuda_driver`, the kernels without PyTorch, on the emulated kernels: right, and wrong where a launch is."""

import os
import shutil
import subprocess

import emulated_cuda
import pytest

BROKEN = """
#include <cstdlib>
#include <string>
#include "cuda/launch.h"
namespace int8kv {
inline bool is_broken(const char* what) { return std::getenv("BROKEN") == std::string(what); }
inline cudaError_t broken_write(ReshapeAndCacheParams params, cudaStream_t stream) {
  if (is_broken("a code of V")) params.num_tokens -= 3;
  return launch_reshape_and_cache(params, stream);
}
inline cudaError_t broken_gather(GatherCacheParams params, cudaStream_t stream) {
  if (is_broken("a gathered key")) params.key_transform.equalizer = nullptr;
  return launch_gather_cache(params, stream);
}
inline cudaError_t broken_attention(PagedAttentionParams params, void* workspace, size_t bytes,
                                    uint32_t* arrivals, int64_t num_arrivals, cudaStream_t stream) {
  if (is_broken("an output")) params.sliding_window = 699;
  if (is_broken("a log-sum-exp")) params.softmax_scale *= 1.02f;
  if (is_broken("misaligned address")) params.cache.data += 1;
  if (is_broken("a counter") && arrivals != nullptr) arrivals[num_arrivals - 1] = 5;
  return launch_paged_attention(params, workspace, bytes, arrivals, num_arrivals, stream);
}
}  // namespace int8kv
#define launch_reshape_and_cache broken_write
#define launch_gather_cache broken_gather
#define launch_paged_attention broken_attention
"""
"""Launchers in place of the real ones that change what the environment variable names."""


@pytest.fixture(scope="module")
def driver(kernels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_driver")
    (folder / "broken.h").write_text(BROKEN)
    options = ["-O1", "-include", "emulated_runtime.h", "-include", "broken.h"]
    return emulated_cuda.build_driver(shutil.which("g++"), kernels, folder, *options)


def run(driver, *arguments, broken=""):
    environment = os.environ | {"BROKEN": broken}
    return subprocess.run([driver, *arguments], env=environment, capture_output=True, text=True)


def test_every_batch_is_right(driver):
    done = run(driver)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == 10 and all(line.endswith(" right") for line in lines)
    assert {line.split()[0] for line in lines} == set(emulated_cuda.DRIVER_FORMATS)


@pytest.mark.parametrize("what", ["a code of V", "a gathered key", "an output", "a log-sum-exp"])
def test_a_wrong_result_is_named_and_shows_in_the_exit_status(driver, what):
    done = run(driver, broken=what)
    assert done.returncode == 1
    assert f"k8v8 decode: {what} is off by" in done.stdout and "WRONG" in done.stdout


def test_a_launch_that_fails_is_named(driver):
    done = run(driver, broken="misaligned address")
    assert done.returncode == 1
    assert done.stderr == "paged_attention: misaligned address\n"


def test_a_counter_that_stays_is_named(driver):
    done = run(driver, broken="a counter")
    assert done.returncode == 1 and "paged_attention left a counter at 5, not 0" in done.stdout


def test_one_step_of_given_sizes_runs_for_a_profiler(driver):
    assert run(driver, "2", "70", "4").returncode == 0
    for sizes in (("2", "70"), ("2", "3", "4"), ("x", "3", "4")):
        assert run(driver, *sizes).returncode == 2

"""The calls of a first run on a GPU, in the order in which they are worth having, each a list of steps.

A call is one command that runs to its end within the limits of a machine which is lent for minutes. Together they
take about 13 of 15 minutes. On a CPU (`--device cpu`) every call has the same steps with other sizes: what compiles
nothing, reads nothing and measures nothing worth knowing, but shows that each script runs and where its output goes.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu.parts import MANIFEST, Manifest
from benchmarks.gpu.steps import Step
from vllm_int8kv.evaluation.record import COMMIT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
KIT = ROOT / "build" / "gpu"
"""What travels: `MANIFEST`, `KERNELS` for the first call, and in `PARTS` a file for each call that brings one."""
KERNELS = "kernels"
DRIVER = "cuda_driver"
PARTS = "parts"
ANSWERS = "answers.jsonl"
SITE = "site"
"""Folder of the store with the packages that were brought."""

SANITIZER_ERROR = 99
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
PROFILED = {"1x32768": ("1", "32768", "1"), "64x8192": ("64", "8192", "1"), "8x8192-verify": ("8", "8192", "8")}
"""Sequences, context and fresh tokens of what `ncu` looks at."""
MAX_WORKERS = 8
CPU_SECONDS = 1800
TIMED_WITH_PARTS = {
    "decode": ("--only", "decode", "--block-size", "16"),
    "verify": ("--only", "verify"),
    "write": ("--only", "write"),
    "block-size-64": ("--only", "decode", "--block-size", "64"),
}
"""What is timed of our own kernels as parts arrive, one with each."""
PEERS = "int8_custom,flash_attn_3,triton"
GRAPHS = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
"""CUDA graphs as usual, but no torch.compile, which takes longer than all the rest."""
RUNNERS = {"V2": "1", "V1": "0"}
"""Values of VLLM_USE_V2_MODEL_RUNNER: V2 is vLLM's default on a GPU, V1 what this project's other tests run on."""


@dataclass(frozen=True)
class Machine:
    """Where calls run, and what differs there."""

    device: str
    """cuda or cpu"""
    kit: Path
    store: Path
    """keeps what has arrived from one call to the next"""
    out: Path

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    def limit(self, seconds: float) -> float:
        """Of a step or a call that may take so long with a GPU; on a CPU an engine alone takes minutes."""
        return seconds if self.is_cuda else CPU_SECONDS

    @property
    def manifest(self) -> Manifest | None:
        return Manifest.load(self.kit) if (self.kit / MANIFEST).is_file() else None

    @property
    def site(self) -> Path:
        return self.store / SITE

    def environment(self) -> dict[str, str]:
        """Of every step: packages that were brought come first, and caches outlive a call."""
        found = {
            "PYTHONPATH": os.pathsep.join([str(self.site), str(ROOT)]),
            # Otherwise the working directory, where vllm_int8kv has no compiled operators, comes before both.
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it compiles kernels when it is first used
            "TRITON_CACHE_DIR": str(self.store / "triton"),
        }
        if commit := self.commit():
            found[COMMIT_VARIABLE] = commit
        return found

    def commit(self) -> str | None:
        """What INT8KV_COMMIT says, or else the manifest; without either a record asks git."""
        return os.environ.get(COMMIT_VARIABLE) or (self.manifest.commit if self.manifest else None)


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def measure(machine: Machine, module: str, name: str, seconds: float, *options: str) -> Step:
    """A step that times something and leaves records."""
    command = python("-m", f"benchmarks.{module}", "--device", machine.device, "--out", str(machine.out), *options)
    return Step(name, command, machine.limit(seconds), is_timing=True)


def kernels(machine: Machine) -> list[Step]:
    """What shows that the kernels are right: the tests, the sanitizers; then what a profiler sees."""
    steps = []
    if wheels := sorted((machine.kit / KERNELS).glob("*.whl")):
        options = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(machine.site)]
        steps.append(
            Step("install", python("-m", "pip", "install", "-q", *options, *map(str, wheels)), machine.limit(20))
        )
    if machine.is_cuda:  # without a GPU, or kernels, all tests would be skipped and pass
        steps.append(Step("gpu", python("-c", "from benchmarks.timing import require_gpu; require_gpu()"), 20))
    tests = ROOT / "tests" / "operators"
    pytest = python("-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "cuda")
    environment = {}
    if find_spec("xdist") is not None:
        pytest += ["-n", str(min(MAX_WORKERS, os.cpu_count() or 1))]
        environment["OMP_NUM_THREADS"] = "1"  # each would take all cores
    chosen = tests if machine.is_cuda else tests / "cuda" / "test_cuda.py"
    steps.append(Step("tests", [*pytest, str(chosen)], machine.limit(100), environment=environment))
    driver = str(machine.kit / KERNELS / DRIVER)
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR), driver]
        steps.append(Step(tool, command, machine.limit(20)))
    for name, sizes in PROFILED.items():
        csv = ["--csv", "--page", "details", "--log-file", str(machine.out / f"ncu-{name}.csv")]
        what = ["--set", "detailed", "--clock-control", "none"]
        command = ["ncu", *what, *csv, driver, *(sizes if machine.is_cuda else ("2", "70", "1"))]
        steps.append(Step(f"ncu-{name}", command, machine.limit(15), is_timing=True))
    return steps


def part(machine: Machine, number: int) -> list[Step]:
    """Takes a part of the packages in, and times some of our kernels."""
    options = ["--kit", str(machine.kit), "--store", str(machine.store)]
    steps = [Step("receive", python("-m", "benchmarks.gpu", "receive", str(number), *options), machine.limit(15))]
    name, only = list(TIMED_WITH_PARTS.items())[number % len(TIMED_WITH_PARTS)]
    chosen = [*only, "--first-model"] if machine.is_cuda else [*only[:2], "--quick"]
    steps.append(measure(machine, "operators", name, 25, "--peers", "int8_custom", *chosen))
    return steps


def answers(machine: Machine) -> list[Step]:
    """Whether a whole engine answers: by both model runners of vLLM, with CUDA graphs and without."""
    steps = []
    if machine.manifest and machine.manifest.parts:
        options = ["--kit", str(machine.kit), "--store", str(machine.store)]
        steps.append(Step("unpack", python("-m", "benchmarks.gpu", "unpack", *options), machine.limit(40)))
        # Each process would otherwise compile what it imports: 26 s instead of 9.
        steps.append(
            Step(
                "compile", python("-m", "compileall", "-q", f"-j{os.cpu_count()}", str(machine.site)), machine.limit(40)
            )
        )
    model = "from vllm_int8kv.commands.models import smollm2; print(smollm2())"
    steps.append(Step("model", python("-c", model), machine.limit(40)))
    answer = python("-m", "benchmarks.gpu.answer", "--out", str(machine.out))
    seconds = machine.limit(45)
    for runner, value in RUNNERS.items():
        for name, options in (("graphs", ["--engine-args", json.dumps(GRAPHS)]), ("eager", ["--enforce-eager"])):
            environment = {"VLLM_USE_V2_MODEL_RUNNER": value if machine.is_cuda else RUNNERS["V1"]}  # V2 needs Triton
            name = f"{runner}-{name}"
            command = [*answer, "--name", name, *(options if machine.is_cuda else ["--enforce-eager"])]
            steps.append(Step(name, command, seconds, environment=environment))
    command = [*answer, "--name", "auto", "--kv-cache-dtype", "auto", "--enforce-eager"]
    steps.append(Step("auto", command, seconds))
    return steps


def engines(machine: Machine) -> list[Step]:
    """Output tokens per second of an engine of the shape of Llama-3.1-8B with random weights, by cache."""
    options = ["--random-weights", "llama-3.1-8b", "--workload", "8x1024", "--workload", "16x8192"]
    options += ["--engine-seconds", "45", "--engine-args", json.dumps(GRAPHS)]
    if not machine.is_cuda:
        options = ["--workload", "2x64", "--steps", "3", "--impls", "int8_custom", "--engine-seconds", "600"]
    options += ["--rounds", "1", "--log", str(machine.out / "engines-vllm.log")]
    return [measure(machine, "engines", "engines", 165, *options)]


def operators(machine: Machine) -> list[Step]:
    """Our kernels beside those of FlashAttention 3 and Triton, at the shapes of one model."""
    options = ["--first-model", "--peers", PEERS] if machine.is_cuda else ["--quick", "--only", "decode"]
    return [measure(machine, "operators", "operators", 110, *options)]


def ladder(machine: Machine) -> list[Step]:
    """The per-channel kernels of arXiv 2601.04719; their errors need no GPU."""
    sizes = ["--seconds", "1"] if machine.is_cuda else ["--shape", "1024x64", "--seconds", "0.1", "--busy"]
    return [measure(machine, "ladder", "ladder", 45, "--errors", "none", *sizes)]


@dataclass(frozen=True)
class Call:
    """A command for the machine with the GPU."""

    steps: Callable[..., list[Step]]
    seconds: float
    """limit of all steps on a GPU"""
    is_engine: bool = False
    """needs vLLM"""

    @property
    def purpose(self) -> str:
        return self.steps.__doc__.partition("\n")[0]


CALLS = {
    "kernels": Call(kernels, 190),
    "part": Call(part, 35),
    "answers": Call(answers, 150, is_engine=True),
    "engines": Call(engines, 170, is_engine=True),
    "operators": Call(operators, 115),
    "ladder": Call(ladder, 50),
}

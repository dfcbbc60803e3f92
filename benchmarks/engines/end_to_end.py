"""Output tokens per second of a whole engine with each cache, through `LLM(...)`.

    python -m benchmarks.engines                  SmolLM2-135M-Instruct on CPU
    python -m benchmarks.engines --threads 1,2 --rounds 5
    python -m benchmarks.engines --dtype float32
    python -m benchmarks.engines --device cuda --random-weights llama-3.1-8b --workload 8x1024 --workload 16x8192

Every engine is a process of its own, started in turn (A B C A B C ...), and runs all workloads. Its sequences get
different prompts, of real text unless the weights are random, and prefill first; then the steps in which all of them
decode are timed at the client, from one output to the next. Before anything is recorded, the first token of at least
3 of 4 sequences must be the one `auto` gives; random weights prefer no token by much, there it is only recorded.
After every engine there is a record per workload over the rounds so far, so that an interrupted run keeps what it
measured.
A cache that vLLM does not run on this device is named and left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.engines import dummy_model
from benchmarks.operators.peers import name_missing
from benchmarks.processes import run_group
from benchmarks.timing import require_gpu, summarize
from vllm_int8kv.commands import models
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.machine import has_fast_bf16
from vllm_int8kv.evaluation.record import Device

IMPLS = {
    Device.cpu: ("auto", "fp8", "int8_custom", "int8_custom:format=k6v4"),
    Device.cuda: ("auto", "int8_custom", "fp8", "int8_per_token_head"),
}
MIN_AGREEMENT = 0.75
RANDOM_WEIGHTS = "dummy"
"""vLLM's `load_format`"""
DEVICE_ARGS = {Device.cpu: {}, Device.cuda: {"max_num_batched_tokens": 8192}}
"""Arguments of every engine: vLLM's default for the tokens of a step differs between GPUs."""


@dataclass(frozen=True)
class Workload:
    """`num_seqs` sequences of `seq_len` tokens of context each."""

    num_seqs: int
    seq_len: int

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """From `8x4096`. Raises typer.BadParameter."""
        sizes = text.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise typer.BadParameter(f"expected sequences x context, as 8x4096, got {text!r}")
        return cls(*map(int, sizes))


@dataclass(frozen=True)
class EnginePlan:
    """What one engine runs: all workloads, `steps` timed decode steps of each."""

    model: str
    dtype: str
    cache: str
    """as `CacheSpec` reads it"""
    workloads: list[Workload]
    steps: int
    engine_args: dict

    @property
    def has_random_weights(self) -> bool:
        return self.engine_args.get("load_format") == RANDOM_WEIGHTS


def run_engine(plan: EnginePlan, num_threads: int | None, log: Path, seconds: float | None = None) -> dict:
    """Run one engine to its end.

    Args:
        num_threads: of the CPU engine; None on a GPU.
        log: gets all that it says, after what is there.
        seconds: when to give it up.

    Returns:
        `backends`, and per workload in `answers`: `times_us` and `first_tokens` and `prefill_s`.

    Raises:
        RuntimeError: it failed or took too long; the message has the last lines of the log.
    """
    environment = {"VLLM_LOGGING_LEVEL": "WARNING"}
    if num_threads is not None:
        cores = sorted(os.sched_getaffinity(0))[-num_threads:]
        environment["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in cores)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.engines.engine", json.dumps(asdict(plan)), str(answer)]
        with log.open("ab", buffering=0) as file:
            file.write(f"=== {plan.cache}\n".encode())
            try:
                code = run_group(command, file, environment, seconds, cwd=record.ROOT)
                ended = f"exited with {code}"
            except subprocess.TimeoutExpired:
                ended = f"was stopped after {seconds:g} s"
        if not answer.exists() or ended != "exited with 0":
            lines = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"engine with {plan.cache} {ended}, see {log}:\n{lines}")
        return json.loads(answer.read_text())


def agreement(answer: dict, baseline: dict) -> float:
    """Share of sequences whose first token is the baseline's."""
    pairs = list(zip(answer["first_tokens"], baseline["first_tokens"], strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def to_record(
    plan: EnginePlan, workload: Workload, rounds: list[dict], backends: list[str], share: float, num_threads: int | None
) -> record.Record:
    """The line of one cache and workload; step times of all rounds so far together."""
    times_us = [time_us for answer in rounds for time_us in answer["times_us"]]
    taken = asdict(summarize(times_us, cpu_us=0.0)) | {"cpu_per_wall": None}
    prefill_s = median(answer["prefill_s"] for answer in rounds)
    return record.of_run(
        record.environment(Device.cuda if num_threads is None else Device.cpu),
        what="end_to_end",
        case=asdict(workload) | {"model": Path(plan.model).name, "steps": plan.steps, "dtype": plan.dtype},
        impl=plan.cache,
        resolved_backend=", ".join(backends),
        tok_per_s=round(workload.num_seqs / taken["median_us"] * 1e6, 2),
        metrics={
            "prefill_tok_per_s": round(workload.num_seqs * workload.seq_len / prefill_s, 1),
            "first_token_agreement": share,
            "engine_args": plan.engine_args,
        },
        num_threads=num_threads or 1,
        **taken,
    )


def missing_impls(device: Device) -> dict[str, str]:
    """Caches that vLLM does not run here, and why."""
    if device == Device.cuda:
        return {}
    from benchmarks.operators import cpu_peers  # vLLM is slow to import, and the engines import this file

    return cpu_peers.missing()


def main(
    device: Annotated[Device, typer.Option(help="where to run")] = Device.cpu,
    model: Annotated[str, typer.Option(help="folder of a model; default: the embedded SmolLM2")] = "",
    random_weights: Annotated[dummy_model.Shape | None, typer.Option(help="a model of this shape instead")] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help="sequences x prompt tokens, default 8x4096; may be repeated")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of the model; default: bfloat16, float32 on a CPU that multiplies bfloat16 in software")
    ] = "",
    steps: Annotated[int, typer.Option(help="decode steps timed per engine and workload")] = 50,
    rounds: Annotated[int, typer.Option(help="engines per cache")] = 3,
    threads: Annotated[str, typer.Option(help="CPU thread counts; default: all cores but one, as vLLM does")] = "",
    impls: Annotated[str, typer.Option(help="caches, comma-separated; default: all, auto is always one")] = "",
    engine_args: Annotated[str, typer.Option(help="arguments of every LLM, JSON")] = "{}",
    engine_seconds: Annotated[float | None, typer.Option(help="limit of one engine; default: none")] = None,
    log: Annotated[Path | None, typer.Option(help="file for what the engines say; default: a temporary one")] = None,
    out: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Measure decoding end to end; one JSON line per cache and workload."""
    counts: list[int | None] = [max(1, (os.cpu_count() or 1) - 1)]
    if device == Device.cuda:
        require_gpu()
        counts = [None]
    elif threads:
        counts = [int(count) for count in threads.split(",")]
    workloads = [Workload.parse(text) for text in workload or ["8x4096"]]
    args = DEVICE_ARGS[device] | json.loads(engine_args)
    if random_weights is not None:
        temporary = tempfile.TemporaryDirectory()  # removed with this name
        folder = Path(temporary.name) / random_weights
        dummy_model.make_config(random_weights).save_pretrained(folder)
        model, args = str(folder), args | {"load_format": RANDOM_WEIGHTS}
    model = model or str(models.smollm2())
    dtype = dtype or ("bfloat16" if has_fast_bf16() else "float32")
    console, failed, missing = Console(), False, missing_impls(device)
    name_missing(missing)
    chosen = ("auto", *(impl for impl in impls.split(",") if impl != "auto")) if impls else IMPLS[device]
    plans = {impl: EnginePlan(model, dtype, impl, workloads, steps, args) for impl in chosen if impl not in missing}
    kept_log = log or Path(tempfile.mkstemp(prefix="engines-", suffix=".log")[1])
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(counts) * rounds * len(plans))
        for count in counts:
            answers: dict[str, list[dict]] = {impl: [] for impl in plans}
            for turn in range(1, rounds + 1):
                for impl, plan in plans.items():
                    where = device if count is None else f"{count} threads"
                    progress.update(task, description=f"{impl}, {where}, round {turn} of {rounds}")
                    try:
                        answers[impl].append(run_engine(plan, count, kept_log, engine_seconds))
                    except RuntimeError as error:
                        if impl == "auto":  # without it there is nothing to compare the others with
                            raise
                        console.print(str(error), style="red", markup=False)
                        failed = True
                        continue
                    finally:
                        progress.advance(task)
                    failed |= not keep(plan, answers[impl], answers["auto"], count, out, console)
    if log is None and not failed:
        kept_log.unlink()
    sys.exit(1 if failed else 0)


def keep(
    plan: EnginePlan, answers: list[dict], of_auto: list[dict], num_threads: int | None, out: Path, console: Console
) -> bool:
    """Record each workload of a cache whose answers agree with those of `auto`. Returns whether all do."""
    all_agree = True
    for index, workload in enumerate(plan.workloads):
        ours, auto = ([answer["answers"][index] for answer in rounds] for rounds in (answers, of_auto))
        share = min(agreement(*pair) for pair in zip(ours, auto, strict=True))
        name = f"{plan.cache}, {workload.num_seqs} x {workload.seq_len}"
        if share < MIN_AGREEMENT and not plan.has_random_weights:
            console.print(f"[red]{name}: {share:.0%} of the first tokens are those of auto; not recorded")
            all_agree = False
            continue
        line = to_record(plan, workload, ours, answers[-1]["backends"], share, num_threads)
        record.append(line, out)
        console.print(f"{name}, {line.n} steps: {line.tok_per_s} tokens/s, first tokens agree {share:.0%}")
    return all_agree

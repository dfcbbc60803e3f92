"""Output tokens per second of a whole engine with each cache format: SmolLM2-135M-Instruct through `LLM(...)`.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --threads 1,2 --rounds 5

Every engine is a process of its own, started in turn (A B C A B C ...). Its sequences get different prompts of
real text and prefill first; then the steps in which all of them decode are timed at the client, from one output
to the next. Before anything is recorded, the first token of at least 3 of 4 sequences must be the one `auto` gives.
Every round ends with a record per format over the rounds so far, so that an interrupted run keeps what it measured.
A format that vLLM does not run on this CPU is named and left out.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

if not __package__:  # run as a script: this folder has a `kernels`, which transformers would take for its own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import record
from benchmarks.peers import name_missing
from benchmarks.timing import summarize
from vllm_int8kv import models

IMPLS = ("auto", "fp8", "int8_custom")
MIN_AGREEMENT = 0.75
BACKENDS = {"auto": "CPU_ATTN", "fp8": "CPU_ATTN", "int8_custom": "INT8_KV"}


@dataclass(frozen=True)
class Plan:
    """What to run: `num_seqs` sequences of `seq_len` tokens of context each, `steps` timed decode steps."""

    model: str
    kv_cache_dtype: str
    num_seqs: int
    seq_len: int
    steps: int


def run_engine(plan: Plan, num_threads: int) -> dict:
    """Run one engine to its end. Returns `times_us` and `first_tokens`.

    Raises:
        RuntimeError: it failed; the message ends with the last lines of its log.
    """
    cores = sorted(os.sched_getaffinity(0))[-num_threads:]
    bind = ",".join(str(core) for core in cores)
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": bind, "VLLM_LOGGING_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.engine", json.dumps(asdict(plan)), str(answer)]
        done = subprocess.run(
            command, cwd=record.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode or not answer.exists():
            log = "\n".join(done.stdout.splitlines()[-30:])
            raise RuntimeError(f"engine with {plan.kv_cache_dtype} exited with {done.returncode}:\n{log}")
        return json.loads(answer.read_text())


def agreement(answer: dict, baseline: dict) -> float:
    """Share of sequences whose first token is the baseline's."""
    pairs = list(zip(answer["first_tokens"], baseline["first_tokens"], strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def to_record(plan: Plan, rounds: list[dict], num_threads: int) -> record.Record:
    """The line of one format; step times of all rounds so far together."""
    times_us = [time_us for answer in rounds for time_us in answer["times_us"]]
    taken = asdict(summarize(times_us, cpu_us=0.0)) | {"cpu_per_wall": None}
    case = {name: value for name, value in asdict(plan).items() if name != "kv_cache_dtype"}
    return record.of_run(
        record.environment(),
        what="end_to_end",
        case=case | {"model": Path(plan.model).name, "dtype": "bfloat16"},
        impl=plan.kv_cache_dtype,
        resolved_backend=BACKENDS[plan.kv_cache_dtype],
        tok_per_s=round(plan.num_seqs / taken["median_us"] * 1e6, 2),
        num_threads=num_threads,
        **taken,
    )


def main(
    model: Annotated[str, typer.Option(help="folder of a model; default: the embedded SmolLM2")] = "",
    num_seqs: Annotated[int, typer.Option(help="sequences that decode together")] = 8,
    context: Annotated[int, typer.Option(help="prompt tokens of each")] = 4096,
    steps: Annotated[int, typer.Option(help="decode steps timed per engine")] = 50,
    rounds: Annotated[int, typer.Option(help="engines per format")] = 3,
    threads: Annotated[str, typer.Option(help="thread counts; default: all cores but one, as vLLM does")] = "",
    out: Annotated[Path, typer.Option(help="folder of the records")] = record.RESULTS,
) -> None:
    """Measure decoding end to end; one JSON line per format."""
    from benchmarks import cpu_peers  # vLLM is slow to import, and the engines import this file

    counts = [int(count) for count in threads.split(",")] if threads else [max(1, (os.cpu_count() or 1) - 1)]
    model = model or str(models.smollm2())
    console, failed, missing = Console(), False, cpu_peers.missing()
    name_missing(missing)
    plans = {impl: Plan(model, impl, num_seqs, context, steps) for impl in IMPLS if impl not in missing}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(counts) * rounds * len(plans))
        for count in counts:
            answers: dict[str, list[dict]] = {impl: [] for impl in plans}
            for turn in range(1, rounds + 1):
                for impl, plan in plans.items():
                    progress.update(task, description=f"{impl}, {count} threads, round {turn} of {rounds}")
                    answers[impl].append(run_engine(plan, count))
                    progress.advance(task)
                failed |= not keep_round(plans, answers, count, out, console)
    sys.exit(1 if failed else 0)


def keep_round(
    plans: dict[str, Plan], answers: dict[str, list[dict]], num_threads: int, out: Path, console: Console
) -> bool:
    """Record every format whose answers agree with those of `auto`. Returns whether all do."""
    all_agree = True
    for impl, plan in plans.items():
        share = min(agreement(ours, auto) for ours, auto in zip(answers[impl], answers["auto"], strict=True))
        if share < MIN_AGREEMENT:
            console.print(f"[red]{impl}: {share:.0%} of the first tokens are those of auto; not recorded")
            all_agree = False
            continue
        line = to_record(plan, answers[impl], num_threads)
        record.append(line, out)
        console.print(
            f"{impl}, {num_threads} threads, {line.n} steps: {line.tok_per_s} tokens/s, first tokens agree {share:.0%}"
        )
    return all_agree


if __name__ == "__main__":
    typer.run(main)

"""`vllm-int8kv bench`: tokens per second with every KV cache, over whatever Ray cluster there is.

    vllm-int8kv bench cpu_smoke
    RAY_ADDRESS=10.0.0.1:6379 vllm-int8kv bench gpu_kvtuner

Each replica is one vLLM engine in a Ray actor. All caches answer the same requests, in turn (A B A B); engines start
once per round and run all cases. Timed, at the client: from the first request sent to the last answer, prefill
included, start of the engines and warm-up excluded. Interrupted, the same command goes on where it stopped.
A run in which a request failed or a replica was lost is kept in the side file, but becomes no record.
"""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from vllm_int8kv.commands import models, terminal
from vllm_int8kv.commands.bench import cluster, html_report, online, summary, sweep, workload
from vllm_int8kv.commands.bench import config as bench_config
from vllm_int8kv.commands.bench.config import BenchConfig, Case, Mode
from vllm_int8kv.commands.bench.dispatch import Dispatch, reason
from vllm_int8kv.commands.bench.replica import Replica
from vllm_int8kv.commands.bench.sweep import Run, Sweep
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.progress import say

STOP_TIMEOUT_S = 30.0
INTERRUPTED = 130
MAX_STARTS = 2
"""Of the engines of one cache in one round."""
WARMUP_TOKENS = 8
"""Output of a warm-up request: it is there for the first prefill and the first decode steps."""


class StartError(RuntimeError):
    """A replica did not start."""


class Bars:
    """Per replica: requests answered, tokens per second so far, time left."""

    def __init__(self, console: Console) -> None:
        rate = TextColumn("{task.fields[tokens_per_s]:>8,.0f} tokens/s")
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate]
        disable = not console.is_interactive
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=disable)
        self.tasks: dict[int, Any] = {}
        self.tokens: dict[int, int] = {}

    def start(self, label: str, totals: list[int | None]) -> None:
        """One bar for each replica; None shows that it is at work on something that has no count. A log gets a line."""
        if self.progress.disable:
            say(self.progress.console, f"{label} ...")
        for task in self.tasks.values():
            self.progress.remove_task(task)
        self.tokens = dict.fromkeys(range(len(totals)), 0)
        self.tasks = {
            index: self.progress.add_task(f"{label}, replica {index}", total=total, tokens_per_s=0.0)
            for index, total in enumerate(totals)
        }

    def advance(self, replica: int, tokens: int, requests: int) -> None:
        self.tokens[replica] += tokens
        task = self.tasks[replica]
        elapsed = self.progress.tasks[self.progress.task_ids.index(task)].elapsed or 1e-9
        self.progress.update(task, advance=requests, tokens_per_s=self.tokens[replica] / elapsed)


@contextmanager
def started(config: BenchConfig, cache: CacheSpec) -> Iterator[tuple[list[Any], list[dict[str, Any]]]]:
    """Running replicas and their descriptions. Raises StartError."""
    with cluster.reserve(config) as places:
        actors = []
        try:
            for place in places:
                args = [config, cache, place.core_start]
                if config.mode == Mode.online:
                    args.append(ray.util.get_node_ip_address())
                actor = ray.remote(Replica if config.mode == Mode.offline else online.Server)
                actors.append(actor.options(**place.options(config)).remote(*args))
            yield actors, describe(config, cache.name, actors)
            # In order, so that shared memory is freed; after an error they may be busy or gone.
            stopping = [actor.stop.remote() for actor in actors]
            ray.wait(stopping, num_returns=len(stopping), timeout=STOP_TIMEOUT_S)
        finally:
            leftovers = cluster.shared_memory()
            for actor in actors:
                ray.kill(actor)
            for file in leftovers:
                file.unlink(missing_ok=True)


def describe(config: BenchConfig, impl: str, actors: list[Any]) -> list[dict[str, Any]]:
    """Wait until all have started. Raises StartError."""
    try:
        return ray.get([actor.describe.remote() for actor in actors], timeout=config.start_timeout_s)
    except ray.exceptions.GetTimeoutError:
        limit = f"{config.start_timeout_s:g}"
        raise StartError(f"a replica with {impl} did not start within start_timeout_s {limit}") from None
    except ray.exceptions.RayError as error:
        raise StartError(f"a replica with {impl} did not start: {reason(error)}") from error


class Bench:
    """A sweep and what it needs."""

    def __init__(self, config: BenchConfig, sweep_: Sweep, bars: Bars) -> None:
        self.config, self.sweep, self.bars = config, sweep_, bars
        tokenizer = workload.load_tokenizer(config.model)
        self.requests = [workload.sample(config, case, tokenizer, config.seed) for case in config.cases]
        first = config.cases[0]
        warmup = replace(
            first,
            num_requests=max(1, config.replicas * config.warmup_requests),
            output_len=min(WARMUP_TOKENS, first.output_len or WARMUP_TOKENS),
        )
        # Other prompts than any case has, so that no prefix is found in the cache later.
        self.warmup = workload.sample(replace(config, num_prefixes=1), warmup, tokenizer, config.seed + 1)

    def missing(self, impl: str, round_: int) -> list[int]:
        """Indices of the cases that still have to run."""
        return [i for i, case in enumerate(self.config.cases) if not self.sweep.is_done(impl, round_, case)]

    def run(self) -> None:
        """All runs that are not done. After a loss the engines start anew, once, and measure what is missing."""
        for round_ in range(self.config.rounds):
            for cache in self.config.kv_cache_dtypes:
                for _ in range(MAX_STARTS):
                    cases = self.missing(cache.name, round_)
                    if not cases or self._run_cases(cache, round_, cases):
                        break

    def _run_cases(self, cache: CacheSpec, round_: int, cases: list[int]) -> bool:
        """Start the engines and run cases until a replica is lost; returns whether all were run."""
        label = f"round {round_ + 1}/{self.config.rounds}, {cache.name}"
        self.bars.start(f"{label}: starting", [None] * self.config.replicas)
        with started(self.config, cache) as (actors, descriptions):
            dispatch = Dispatch(actors)
            self.bars.start(f"{label}: warm-up", [None] * self.config.replicas)
            self._warm_up(dispatch, descriptions)
            for index in cases:
                totals = [len(share) for share in workload.shares(self.requests[index], self.config.replicas)]
                self.bars.start(f"{label}: case {index + 1}/{len(self.config.cases)}", totals)
                run = self._measure((cache.name, round_), index, dispatch, descriptions)
                self.sweep.append(run)
                for problem in (
                    *run.lost,
                    *(f"request {row.request_id} failed: {row.error}" for row in run.failed[:3]),
                ):
                    self.bars.progress.console.print(f"{label}: {problem}", style="red", markup=False)
                if run.lost:
                    return False
        return True

    def _warm_up(self, dispatch: Dispatch, descriptions: list) -> None:
        if self.config.warmup_requests and self.config.mode == Mode.offline:
            outcome = dispatch.run(self.warmup, None, self.bars.advance)
            if problems := [*outcome.lost.values(), *(row.error for row in outcome.rows.values() if row.error)]:
                raise StartError(f"a replica did not answer its warm-up requests: {problems[0]}")
        elif self.config.warmup_requests:
            online.load(self.config, self.config.cases[0], descriptions[0]["url"], self.warmup, float("inf"), int)

    def _measure(self, key: tuple[str, int], index: int, dispatch: Dispatch, descriptions: list) -> Run:
        case, requests = self.config.cases[index], self.requests[index]
        if self.config.mode == Mode.offline:
            return self._offline(key, case, dispatch, descriptions, requests)
        return online.measure(
            self.config, case, key, descriptions[0], requests, lambda tokens: self.bars.advance(0, tokens, 1)
        )

    def _offline(self, key: tuple[str, int], case: Case, dispatch: Dispatch, descriptions: list, requests: list) -> Run:
        outcome = dispatch.run(requests, case.max_concurrency, self.bars.advance)
        return Run(
            *key,
            asdict(case),
            duration_s=outcome.duration_s,
            replicas=descriptions,
            peak_running_seqs=outcome.peak_running_seqs,
            lost=[f"replica {index} ({descriptions[index]['host']}): {why}" for index, why in outcome.lost.items()],
            resubmitted=outcome.resubmitted,
            rows=[outcome.rows[request.request_id] for request in requests],
        )


def run_bench(config_file: Path, out: Path, address: str, fresh: bool) -> int:
    """Measure a configuration: records, per-request rows, a table and a report with plots.

    Args:
        config_file: YAML, see `config.BenchConfig`.
        out: folder of the records; an unfinished sweep in it goes on.
        address: of a Ray cluster; empty starts one on this machine.
        fresh: start anew instead.

    Returns:
        The exit status: 0, 1 if something was not measured, or 130 if it was interrupted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=True)
    try:
        config = bench_config.load(config_file)
        environment = record.environment()
        origin = sweep.Origin(
            config_file.stem,
            sweep.sha256(config),
            **{name: environment[name] for name in ("device", "commit", "dirty")},
        )
        num_runs = config.rounds * len(config.kv_cache_dtypes) * len(config.cases)
        sweep_ = sweep.open_sweep(out, origin, num_runs, fresh)
        if sweep_.runs:
            console.print(f"continuing {sweep_.path.name}: {len(sweep_.runs)} of {num_runs} runs are there")
        models.resolve(config.model, partial(say, console))
        own_store = sweep_.path.with_suffix(".kv_store")
        if config.has_store and config.kv_store_path is None:
            config = replace(config, kv_store_path=str(own_store.resolve()))
        bars = Bars(console)
        with cluster.connect(address or None), bars.progress:
            cluster.check_nodes(config)
            Bench(config, sweep_, bars).run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        return INTERRUPTED
    except (ImportError, ValueError, cluster.ClusterError, StartError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    lines, problems = summary.records(config, sweep_)
    if not problems:  # else the same command goes on with what the engines have stored
        shutil.rmtree(own_store, ignore_errors=True)
    for line in lines:
        record.append(line, out)
    terminal.console.print(summary.table(config_file.stem, lines))
    html_report.write(out, out / "report.html")
    console.print(f"records, requests and report.html are in {out}")
    for problem in problems:
        console.print(f"not recorded: {problem}", style="red", markup=False)
    return 1 if problems else 0

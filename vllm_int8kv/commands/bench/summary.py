"""From the runs of a sweep to its records: one per case and cache, over all rounds."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from vllm_int8kv.commands.bench.config import BenchConfig, Case, Device, Mode
from vllm_int8kv.commands.bench.sweep import FOLDER, Run, Sweep
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import LABELS, Group, Record, by_case, summarize

WHAT = {Mode.offline: "throughput", Mode.online: "online"}
SHARED = (
    *("mode", "dataset", "num_prefixes", "seed", "rounds", "replicas", "cpus_per_replica", "tensor_parallel_size"),
    *("pipeline_parallel_size", "kv_cache_seqs", "max_num_seqs", "engine_args"),
)
"""Keys of a configuration that are part of the case of a record."""
MIN_AGREEMENT = 0.5
"""Share of requests whose first token must be the one `auto` gives. Prompts of random tokens leave the model
undecided, so a right cache may miss some; a wrong one misses nearly all."""


def records(config: BenchConfig, sweep: Sweep) -> tuple[list[Record], list[str]]:
    """The records of a sweep and, for each that may not be one, why."""
    lines, problems = [], []
    for case in config.cases:
        for impl in (cache.name for cache in config.kv_cache_dtypes):
            runs = [run for run in sweep.runs.values() if run.impl == impl and run.case == asdict(case)]
            found = list(_problems(config, case, runs, sweep))
            if found:
                problems.append(f"{impl}, {asdict(case)}: {'; '.join(found)}")
            else:
                lines.append(to_record(config, case, runs, sweep))
    return lines, problems


def _problems(config: BenchConfig, case: Case, runs: list[Run], sweep: Sweep) -> Iterator[str]:
    if len(runs) != config.rounds:
        yield f"{len(runs)} of {config.rounds} rounds"
    for run in runs:
        where = f"round {run.round + 1}: "
        if run.failed:
            yield f"{where}{len(run.failed)} of {len(run.rows)} requests failed"
        if run.lost:
            yield f"{where}lost {', '.join(run.lost)}; {run.resubmitted} requests were resubmitted"
        if len(run.rows) != case.num_requests:
            yield f"{where}{len(run.rows)} requests instead of {case.num_requests}"
        short = [row for row in run.rows if case.output_len and row.output_tokens != case.output_len]
        if short and not run.failed:
            yield f"{where}{len(short)} requests without {case.output_len} output tokens"
        share = first_token_agreement(run, sweep)
        if share is not None and share < MIN_AGREEMENT:
            yield f"{where}{share:.0%} of the first tokens are those of auto"


def first_token_agreement(run: Run, sweep: Sweep) -> float | None:
    """Share of requests whose first token is the one `auto` gave in the same round; None without such tokens."""
    baseline = next((other for other in sweep.runs.values() if other.key == ("auto", *run.key[1:])), None)
    if baseline is None:
        return None
    theirs = {row.request_id: row.first_token for row in baseline.rows}
    pairs = [(row.first_token, theirs.get(row.request_id)) for row in run.rows if row.first_token is not None]
    return sum(ours == other for ours, other in pairs) / len(pairs) if pairs else None


def to_record(config: BenchConfig, case: Case, runs: list[Run], sweep: Sweep) -> Record:
    """The line of one case and cache; times are those of whole runs."""
    first = runs[0]
    taken = asdict(summarize([run.duration_s * 1e6 for run in runs], cpu_us=0.0)) | {"cpu_per_wall": None}
    environments = [replica["environment"] for replica in first.replicas]
    devices = sorted({environment["device"] for environment in environments})
    environment = environments[0] | {name: record.environment()[name] for name in ("command", "commit", "dirty")}
    num_gpus = config.replicas * config.world_size if config.device == Device.cuda else 0
    environment["device"] = " + ".join(f"{num_gpus} x {device}" if num_gpus else device for device in devices)
    backends = sorted({backend for replica in first.replicas for backend in replica["backends"]})
    return record.of_run(
        environment,
        what=WHAT[config.mode],
        case=describe(config, case, sweep),
        impl=first.impl,
        resolved_backend=", ".join(backends),
        tok_per_s=round(median(run.output_tok_per_s for run in runs), 2),
        num_threads=config.replicas * config.cpus_per_replica,
        metrics=metrics(case, runs, sweep),
        **taken,
    )


def describe(config: BenchConfig, case: Case, sweep: Sweep) -> dict:
    """All sizes of a case: what must be equal for two records to be comparable."""
    shared = {name: getattr(config, name) for name in SHARED} | {"goodput_ms": dict(config.goodput_ms)}
    return {"config": sweep.origin.config, "model": Path(config.model).name} | shared | asdict(case)


def metrics(case: Case, runs: list[Run], sweep: Sweep) -> dict:
    """What a throughput record has beside the rate; percentiles over the requests of all rounds."""
    rows = [row for run in runs for row in run.rows]
    agreements = [share for run in runs if (share := first_token_agreement(run, sweep)) is not None]
    found = {
        "num_requests": case.num_requests,
        "failed_requests": sum(len(run.failed) for run in runs),
        "input_tokens": sum(row.input_tokens for row in runs[0].rows),
        "output_tokens": sum(row.output_tokens for row in runs[0].rows),
        "output_tok_per_s_by_round": [round(run.output_tok_per_s, 2) for run in runs],
        "decode_tok_per_s": decode_rate(runs),
        "requests_per_s": round(median(len(run.rows) / run.duration_s for run in runs), 4),
        **percentiles("ttft_ms", [row.ttft_ms for row in rows]),
        "ttft_ms_p50_by_round": [
            percentiles("ttft_ms", [row.ttft_ms for row in run.rows])["ttft_ms_p50"] for run in runs
        ],
        **percentiles("itl_ms", [value for row in rows for value in row.itl_ms]),
        **percentiles("e2e_ms", [row.e2e_ms for row in rows]),
        "kv_cache_tokens_per_replica": min(replica["kv_cache_tokens"] for replica in runs[0].replicas),
        "peak_running_seqs_per_replica": max(run.peak_running_seqs for run in runs),
        "first_token_agreement": round(min(agreements), 4) if agreements else None,
        "requests_file": f"{FOLDER}/{sweep.path.name}",
    }
    if runs[0].server is not None:
        goodput = [run.server["request_goodput"] for run in runs]
        found["goodput_requests_per_s"] = None if None in goodput else round(median(goodput), 4)
    return found


def decode_rate(runs: list[Run]) -> float | None:
    """Output tokens per second while all requests of a run decode; None where no such time is (or not all were sent
    at once)."""
    rates = []
    for run in runs:
        rows = run.rows
        begin, end = max(row.ttft_ms for row in rows), min(row.e2e_ms for row in rows)
        if run.case["max_concurrency"] is not None or run.case["request_rate"] is not None or end <= begin:
            return None
        arrivals = np.concatenate([row.ttft_ms + np.cumsum(row.itl_ms) for row in rows])
        rates.append(((arrivals > begin) & (arrivals <= end)).sum() / (end - begin) * 1e3)
    return round(float(median(rates)), 2)


def percentiles(name: str, values: list[float]) -> dict[str, float]:
    """`<name>_p50`, `_p90` and `_p99`; empty without values."""
    if not values:
        return {}
    found = np.percentile(values, (50, 90, 99))
    return {f"{name}_p{percent}": round(float(value), 3) for percent, value in zip((50, 90, 99), found, strict=True)}


def case_text(case: dict) -> str:
    """How a table names a case."""
    prefix = f"{case['prefix_len']}+" if case["prefix_len"] else ""
    lengths = f"{prefix}{case['input_len'] or 'file'} in, {case['output_len'] or 'file'} out"
    rate = f", {case['request_rate']:g} requests/s" if case["request_rate"] else ""
    in_flight = f", {case['max_concurrency']} in flight" if case["max_concurrency"] else ""
    return f"{lengths}{in_flight}{rate}"


def table(title: str, lines: list[Record]) -> Table:
    """For the console: where it is narrow, names are folded before a number is cut off."""
    head = ("case", "cache", "output\ntokens/s", "vs auto", "TTFT\np50, ms", "ITL\np50, ms", "failed")
    found = Table(*head, title=title, caption=lines[0].device if lines else None)
    found.columns[1].overflow = "fold"
    for column in found.columns[2:]:
        column.justify, column.no_wrap = "right", True
    baselines = {case_text(line.case): line.tok_per_s for line in lines if line.impl == "auto"}
    for line in lines:
        baseline = baselines.get(case_text(line.case))
        found.add_row(
            case_text(line.case),
            line.impl,
            f"{line.tok_per_s:,.1f}",
            f"{line.tok_per_s / baseline:.2f}x" if baseline else "",
            f"{line.metrics['ttft_ms_p50']:,.0f}",
            f"{line.metrics.get('itl_ms_p50', float('nan')):,.1f}",
            f"{line.metrics['failed_requests']} of {line.metrics['num_requests']}",
        )
    return found


def groups(what: str, results: Path) -> dict[str, list[Group]]:
    """By configuration: the newest records of its cases on the device measured last, by cache."""
    found: dict[str, list[Group]] = {}
    for group in by_case(record.read(what, results)):
        # Without its baseline a case compares nothing; one sweep may have been cut short.
        if "auto" in group:
            found.setdefault(group["auto"].case["config"], []).append(group)
    return found


def by_cache(cases: list[Group]) -> dict[str, list[Record | None]]:
    """The records of each cache by case, for a line of a plot; None, a gap in it, where the cache was not measured."""
    names = dict.fromkeys(impl for group in cases for impl in group)
    return {impl: [group.get(impl) for group in cases] for impl in names}


def capacity(line: Record) -> float:
    """Longest requests of the case that fit into the KV memory of a replica."""
    case = line.case
    return line.metrics["kv_cache_tokens_per_replica"] / (case["prefix_len"] + case["input_len"] + case["output_len"])


def label(impl: str) -> str:
    """How tables and plots name a cache: those of this plugin as they are spelled."""
    return impl if impl.startswith(KV_CACHE_DTYPE) else LABELS.get(impl, f"vLLM {impl}")

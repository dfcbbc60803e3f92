"""The tables of tests/README.md: what the tests, the soak and the fuzzers found, from their records."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.report.tables import markdown
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import Record


def support_table(results: Path) -> str:
    """Features with what the tests that ran say about them (`tests/helpers/support.py`)."""
    path = results / "support.json"
    if not path.exists():
        return "_Not tested yet: `make support`._"
    table = json.loads(path.read_text())
    lines = ["| feature, on CPU | works | shown by |", "|---|---|---|"]
    for feature, (outcome, text, tests) in table["rows"].items():
        names = ", ".join(sorted({f"`{test.split('::')[1]}`" for test in tests}))
        lines.append(f"| {feature} | {outcome} | {text}: {names} |")
    return "\n".join(lines) + f"\n\n<sub>vLLM {table['vllm']}; `benchmarks/results/support.json`.</sub>"


def soak_table(results: Path) -> str:
    """The newest soak of each cache, a column each."""
    newest = {line.impl: line for line in record.read("soak", results)}
    if not newest:
        return "_Not measured yet: `make soak MINUTES=30`._"
    columns = [_soak_column(line) for line in newest.values()]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    where = "<br>".join(f"{line.device}; {line.utc[:10]}; commit {line.commit}" for line in newest.values())
    head = ["SmolLM2 in fp32", *(f"`{impl}`" for impl in newest)]
    return f"{markdown(head, rows)}\n\n<sub>{where}; `benchmarks/results/soak.jsonl`.</sub>"


def _soak_column(line: Record) -> dict[str, str]:
    m, case = line.metrics, line.case
    third, last = (m[f"rss_{quarter}_quarter_bytes"] / 1e6 for quarter in ("third", "last"))
    parted = m["greedy_answers_compared"], m["differences_at_near_ties"], m["differences_unexplained"]
    return {
        "length, requests in flight": f"{case['minutes']:g} minutes, {case['connections']}",
        "requests, output tokens": f"{m['requests']:,}, {m['output_tokens']:,}",
        "KV pool in use, median and most": f"{m['median_pool_usage']:.1%}, {m['max_pool_usage']:.1%}",
        "preemptions, prefix cache hit rate": f"{m['preemptions']:,}, {m['prefix_cache_hit_rate']:.0%}",
        "lost, corrupt": f"{m['lost']}, {m['corrupt']}",
        "greedy answers compared; different at a near tie; else": "; ".join(f"{count:,}" for count in parted),
        "largest difference of a logprob from the idle server's, nats": f"{m['largest_logprob_difference']:.2g}",
        "memory of all processes, third and last quarter": f"{third:,.0f} MB, {last:,.0f} MB",
    }


def fuzz_table(results: Path) -> str:
    """What came of calls of the operators with arbitrary arguments."""
    records = record.read("fuzz", results)
    if not records:
        return "_Not measured yet: `make fuzz`._"
    line = records[-1]
    rows = []
    for operator, counts in line.metrics.items():
        named = {name: count for name, count in counts.items() if name != "computed"}
        reasons = ", ".join(f"`{name}` {count:,}" for name, count in sorted(named.items(), key=lambda item: -item[1]))
        calls = sum(counts.values())
        rows.append([f"`{operator}`", f"{calls:,}", f"{counts.get('computed', 0):,}", reasons])
    head = [
        "operator",
        "calls",
        "computed, as the reference does where there is one",
        "refused, by what the error names",
    ]
    kernels = line.resolved_backend.removeprefix("INT8_KV ")
    if line.case.get("emulated"):
        kernels += "; those with VNNI or AVX-512 on emulated instructions"
    where = f"<sub>Kernels: {kernels}. {line.device}; {line.utc[:10]}; commit {line.commit}; "
    where += "`benchmarks/results/fuzz.jsonl`.</sub>"
    return f"{markdown(head, rows)}\n\n{where}"


TABLES: dict[str, Callable[[Path], str]] = {"support": support_table, "soak": soak_table, "fuzz": fuzz_table}

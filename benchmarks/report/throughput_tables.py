"""What whole engines do, from the records: decode steps, runs over Ray and the server under load.

The last two compare records of one device, the last measured.
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.report.tables import markdown, per_machine, source, times
from vllm_int8kv.commands.bench.summary import case_text, groups, label
from vllm_int8kv.evaluation.record import Group, Record

CAPTIONS = {
    "cpu_long_context": "Eight sequences of 4096 prompt tokens on one core:",
    "cpu_memory_pressure": "KV memory for four sequences of the 16-bit cache, on one core:",
    "cpu_kvtuner": "The batch sizes and prompt lengths of KVTuner's table, on one core:",
    "cpu_online": "The OpenAI server on one core, the load on the other:",
}
"""By configuration; one that is not here is introduced by its name."""
SHARED_STORE = "cpu_shared_store"
"""The configuration with a table of its own, by rounds: the store is empty in the first."""


def end_to_end_table(results: Path) -> str:
    """Output tokens per second while decoding, through `LLM(...)`."""
    return per_machine("end_to_end", results, _end_to_end_of)


def _end_to_end_of(found: list[Group]) -> str:
    rows = []
    for group in found:
        for impl, line in group.items():
            rows.append(
                [
                    impl if impl.startswith("int8_custom") else f"vLLM {impl}",
                    line.case["dtype"],
                    f"{line.case['num_seqs']} x {line.case['seq_len']}",
                    str(line.num_threads),
                    f"{line.tok_per_s:.1f}",
                    f"{line.median_us / 1e3:.1f}",
                    f"{line.p10_us / 1e3:.1f} to {line.p90_us / 1e3:.1f}",
                    times(line.tok_per_s / group["auto"].tok_per_s),
                ]
            )
    head = ["KV cache", "model", "sequences x context", "threads", "output tokens/s", "ms per step", "p10 to p90"]
    return markdown([*head, "vs auto"], rows)


def speedup(group: Group, impl: str) -> float:
    """Output tokens per second against the unquantized cache."""
    return group[impl].tok_per_s / group["auto"].tok_per_s


def spread(line: Record) -> str:
    """Least to largest round."""
    rounds = line.metrics["output_tok_per_s_by_round"]
    return f"{min(rounds):,.1f} to {max(rounds):,.1f}" if len(rounds) > 1 else "one round"


def throughput_table(results: Path) -> str:
    """Whole runs, prefill included, by configuration."""
    found = groups("throughput", results)
    found.pop(SHARED_STORE, None)
    if not any(found.values()):
        return "_Not measured yet: `vllm-int8kv bench cpu_long_context`._"
    head = ["requests", "cache", "output tokens/s", "least to largest round", "vs bf16", "TTFT p50, ms", "ITL p50, ms"]
    head += ["ITL vs bf16", "sequences at a time", "KV memory, tokens"]
    parts = []
    for config, cases in sorted(found.items()):
        rows = [
            [
                case_text(line.case),
                label(impl),
                f"{line.tok_per_s:,.1f}",
                spread(line),
                f"{speedup(group, impl):.2f}x",
                f"{line.metrics['ttft_ms_p50']:,.0f}",
                f"{line.metrics['itl_ms_p50']:,.1f}",
                f"{group['auto'].metrics['itl_ms_p50'] / line.metrics['itl_ms_p50']:.2f}x",
                str(line.metrics["peak_running_seqs_per_replica"]),
                f"{line.metrics['kv_cache_tokens_per_replica']:,}",
            ]
            for group in cases
            for impl, line in group.items()
        ]
        parts.append(f"{CAPTIONS.get(config, f'{config}:')}\n\n{markdown(head, rows)}\n\n{source(cases)}")
    return "\n\n".join(parts)


def shared_store_table(results: Path) -> str:
    """Replicas with a store between them, round by round."""
    cases = groups("throughput", results).get(SHARED_STORE)
    if not cases:
        return f"_Not measured yet: `vllm-int8kv bench {SHARED_STORE}`._"
    num_rounds = cases[0]["auto"].case["rounds"]
    head = ["requests", "cache"]
    for round_ in range(num_rounds):
        head += [f"round {round_ + 1}: output tokens/s", "vs bf16", "TTFT p50, ms"]
    rows = []
    for group in cases:
        for impl, line in group.items():
            row = [case_text(line.case), label(impl)]
            for round_ in range(num_rounds):
                rate, ttft = (line.metrics[f"{name}_by_round"][round_] for name in ("output_tok_per_s", "ttft_ms_p50"))
                baseline = group["auto"].metrics["output_tok_per_s_by_round"][round_]
                row += [f"{rate:,.1f}", times(rate / baseline), f"{ttft:,.0f}"]
            rows.append(row)
    return f"{markdown(head, rows)}\n\n{source(cases)}"


def online_table(results: Path) -> str:
    """The server under load."""
    found = groups("online", results)
    if not any(found.values()):
        return "_Not measured yet: `vllm-int8kv bench cpu_online`._"
    head = ["load", "cache", "goodput, requests/s", "output tokens/s", "TTFT p50, ms", "TTFT p99, ms", "ITL p50, ms"]
    head += ["ITL p99, ms"]
    parts = []
    for config, cases in sorted(found.items()):
        rows = [
            [
                case_text(line.case),
                label(impl),
                f"{line.metrics['goodput_requests_per_s'] or 0:.2f}",
                f"{line.tok_per_s:,.1f}",
                *(f"{line.metrics[name]:,.0f}" for name in ("ttft_ms_p50", "ttft_ms_p99")),
                *(f"{line.metrics[name]:,.1f}" for name in ("itl_ms_p50", "itl_ms_p99")),
            ]
            for group in cases
            for impl, line in group.items()
        ]
        slo = next(iter(cases[0].values())).case["goodput_ms"]
        bound = ", ".join(f"{name.upper()} within {limit:g} ms" for name, limit in slo.items())
        intro = f"{CAPTIONS.get(config, f'{config}:')} goodput counts requests with {bound}." if slo else config
        parts.append(f"{intro}\n\n{markdown(head, rows)}\n\n{source(cases)}")
    return "\n\n".join(parts)


def pressure_data(results: Path) -> list[Group]:
    """The memory-pressure configuration by requests in flight, for the plot."""
    cases = groups("throughput", results).get("cpu_memory_pressure", [])
    return sorted(cases, key=lambda group: group["auto"].case["max_concurrency"])


TABLES: dict[str, Callable[[Path], str]] = {
    "end_to_end": end_to_end_table,
    "throughput": throughput_table,
    "shared_store": shared_store_table,
    "online": online_table,
}

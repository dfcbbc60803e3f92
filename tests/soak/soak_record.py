"""What a soak leaves behind: its summary, and a line in `benchmarks/results/soak.jsonl`."""

import statistics
from pathlib import Path
from typing import Any

from server import BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_BLOCKS
from soak import Result

from vllm_int8kv.cache import library


def summary(result: Result) -> dict[str, Any]:
    """The counts of a soak; bytes of memory are of all processes of the server together."""
    queries = result.metrics["vllm:prefix_cache_queries_total"]
    return {
        "requests": sum(result.requests.values()),
        "requests_by_kind": dict(sorted(result.requests.items())),
        "output_tokens": result.output_tokens,
        "preemptions": int(result.metrics["vllm:num_preemptions_total"]),
        "prefix_cache_hit_rate": result.metrics["vllm:prefix_cache_hits_total"] / queries,
        "median_pool_usage": statistics.median(result.usage),
        "max_pool_usage": max(result.usage),
        "lost": len(result.lost),
        "corrupt": len(result.corrupt),
        "greedy_answers_compared": result.compared,
        "differences_at_near_ties": result.explained,
        "differences_unexplained": len(result.unexplained),
        "largest_logprob_difference": result.noise,
        "log_errors": len(result.log_errors),
        "rss_third_quarter_bytes": int(result.rss_quarter(2)),
        "rss_last_quarter_bytes": int(result.rss_quarter(3)),
    }


def write(result: Result, minutes: float, connections: int, results: Path) -> None:
    """Append the record of a soak that had no problems."""
    from vllm_int8kv.evaluation import record

    deciles = statistics.quantiles(result.latencies, n=10)
    record.append(
        record.of_run(
            record.environment(),
            what="soak",
            case={
                "model": "smollm2",
                "dtype": "float32",
                "minutes": minutes,
                "connections": connections,
                "max_num_seqs": MAX_NUM_SEQS,
                "max_model_len": MAX_MODEL_LEN,
                "block_size": BLOCK_SIZE,
                "num_blocks": NUM_BLOCKS,
            },
            impl=result.cache,
            resolved_backend=f"INT8_KV {library.cpu_isa()}",
            median_us=1e6 * statistics.median(result.latencies),
            p10_us=1e6 * deciles[0],
            p90_us=1e6 * deciles[-1],
            n=len(result.latencies),
            tok_per_s=result.output_tokens / (60 * minutes),
            metrics=summary(result),
            num_threads=0,
            cpu_per_wall=None,
        ),
        results,
    )

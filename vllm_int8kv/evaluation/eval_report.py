"""The report of `vllm-int8kv eval` as tables for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

PATH_MEANINGS = {
    "decode": "decode steps",
    "prefill": "prefill in one step",
    "chunked": "prefill in chunks",
    "prefix": "prefill after a prefix-cache hit",
}


def _right(title: str, *columns: str) -> Table:
    """A table whose columns are numbers but for the first."""
    table = Table(title=title)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def print_report(report: dict[str, Any], console: Console) -> None:
    """Show a report of `evaluate.evaluate`."""
    texts, caches = report["text_tokens"], report["caches"]
    title = f"{report['model']}, {report['dtype']} arithmetic: {len(texts)} texts ({report['text_source']})"
    columns = ("KL per token (nats)", "95 % interval", "p99", "same top token", "perplexity", "change")
    table = _right(title, "tokens read by", *columns, "differs from decode")
    for path, meaning in PATH_MEANINGS.items():
        for name, cache in caches.items():
            if path not in cache["paths"]:
                continue
            row, own = cache["paths"][path], "-"
            kl, change = row["kl_per_token"], row["perplexity_change"]
            if difference := row.get("log_prob_difference_from_decode"):
                own = f"{difference['mean_abs']:.1e}"
            is_reference = name == "auto" and path == "decode"
            table.add_row(
                f"{meaning}: {name}",
                "reference" if is_reference else f"{kl['value']:.1e}",
                "" if is_reference else f"{kl['low']:.1e} to {kl['high']:.1e}",
                "" if is_reference else f"{row['kl_p99']:.1e}",
                "" if is_reference else f"{row['top1_agreement']['value']:.1%}",
                f"{row['perplexity']:.3f}",
                "" if is_reference else f"{change['value']:+.3%} ± {(change['high'] - change['low']) / 2:.3%}",
                own,
            )
        table.add_section()
    console.print(table)
    _print_answers(caches, console)
    _print_needles(caches, console)
    notes = [
        f"{sum(texts.values()):,} tokens; KL(auto || cache) over the whole vocabulary, compared with auto by decode "
        "steps. Differs from decode: mean |difference| of the log-probability of the text between this way of reading "
        "and decode steps, same cache.",
    ]
    shares = [cache["paths"]["prefix"]["prefix_hit_share"] for cache in caches.values() if "prefix" in cache["paths"]]
    if shares:
        short = ", the last of a shorter text" if min(texts.values()) <= report["prefix_stride"] else ""
        notes.append(
            f"Prefix-cache path: every {report['prefix_stride']}th token{short}; {min(shares):.0%} of the prompt "
            f"tokens were found in the cache (blocks of {report['block_size']})."
        )
    console.print(Text(" ".join(notes)), style="dim")
    for name, why in report["left_out"].items():
        console.print(Text(f"{name} is left out, vLLM does not run it here: {why}"), style="yellow")


def _print_answers(caches: dict[str, Any], console: Console) -> None:
    if "first_divergence" not in caches["auto"]:
        return
    max_tokens = caches["auto"]["first_divergence"]["max_tokens"]
    table = _right("Greedy answers", "cache", "equal to auto's", f"equal tokens at the start (of {max_tokens})")
    for name, cache in caches.items():
        found = cache["first_divergence"]
        table.add_row(name, f"{found['same']:.0%} of {len(found['positions'])}", f"{found['mean_tokens']:.0f}")
    console.print(table)


def _print_needles(caches: dict[str, Any], console: Console) -> None:
    cells = caches["auto"].get("needle")
    if not cells:
        return
    depths = sorted({cell["depth"] for cell in cells})
    table = _right("Hidden numbers found, by depth in the context", "context, cache", *(f"{d:.0%}" for d in depths))
    for length in sorted({cell["length"] for cell in cells}):
        for name, cache in caches.items():
            found = {cell["depth"]: cell["found"] for cell in cache["needle"] if cell["length"] == length}
            table.add_row(f"{length:,} tokens, {name}", *(f"{found[depth]:.0%}" for depth in depths))
        table.add_section()
    console.print(table)

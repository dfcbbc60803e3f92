"""The tables of the operators and engines as Markdown, from the newest records."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.operators.cases import batch_text
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import LABELS, Group, Record, by_case, by_device


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machines(what: str, results: Path) -> list[list[Group]]:
    """The newest complete measurements of a kind on CPU, a list per machine in the order they were first measured on.

    Which formats there are depends on the machine: vLLM's fp8 cache needs AVX-512.
    """
    found = by_device(line for line in record.read(what, results) if line.cuda is None)
    return [complete for same in found.values() if (complete := _complete(same))]


def _complete(found: list[Group]) -> list[Group]:
    wanted = {"int8_custom", "auto", *(impl for group in found for impl in group)}
    return [group for group in found if group.keys() >= wanted]


def per_machine(what: str, results: Path, table: Callable[[list[Group]], str], intro: str = "") -> str:
    """A table for each machine measured on, with where its numbers come from; several carry the machine's name."""
    found = machines(what, results)
    if not found:
        return missing(what)
    blocks = [intro] if intro else []
    for measured in found:
        if len(found) > 1:
            blocks.append(f"**{measured[0]['auto'].device}**")
        blocks += [table(measured), source(measured)]
    return "\n\n".join(blocks)


def impls_of(found: list[Group]) -> list[str]:
    """The implementations that every group has, ours first."""
    return [impl for impl in LABELS if all(impl in group for group in found)]


def latency_heads(impls: list[str]) -> list[str]:
    return [f"{LABELS[impl]}, us" for impl in impls]


def latencies(group: Group, impls: list[str]) -> list[str]:
    return [f"{group[impl].median_us:,.0f}" for impl in impls]


def gain_heads(impls: list[str]) -> list[str]:
    """Columns for how many times faster we, the first, are than each of the others."""
    return [f"vs {'bf16' if impl == 'auto' else impl}" for impl in impls[1:]]


def gains(group: Group, impls: list[str]) -> list[str]:
    return [times(faster(group, impl)) for impl in impls[1:]]


def faster(group: Group, impl: str) -> float:
    """How many times faster we are than another implementation."""
    return group[impl].median_us / group["int8_custom"].median_us


def times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def source(found: list[Group]) -> str:
    """Where the numbers come from, for below a table."""
    lines = [line for group in found for line in group.values()]
    files = " and ".join(sorted({f"`benchmarks/results/{line.what}.jsonl`" for line in lines}))
    newest = max(lines, key=lambda line: line.utc)
    commit = newest.commit + (" with local changes" if newest.dirty else "")
    return (
        f"<sub>{newest.device}; {newest.utc[:10]}; PyTorch {newest.torch}, vLLM {newest.vllm}; commit {commit}; "
        f"{files}.</sub>"
    )


def shape_text(line: Record) -> str:
    case = line.case
    return f"{case['num_heads']}/{case['num_kv_heads']} heads x {case['head_size']}"


def decode_table(results: Path) -> str:
    """The shape of an 8B model."""
    return per_machine("decode", results, _decode_of, "32 query heads, 8 KV heads, head size 128:")


def _decode_of(found: list[Group]) -> str:
    impls, rows = impls_of(found), []
    for group in sorted(found, key=lambda g: (g["auto"].num_threads, *sizes(g))):
        ours = group["int8_custom"]
        num_seqs, seq_len = sizes(group)
        if is_8b(group) and (num_seqs == 8 or seq_len == 4096):
            rows.append(
                [
                    f"{num_seqs} x {seq_len}",
                    str(ours.num_threads),
                    *latencies(group, impls),
                    f"{ours.gb_per_s:.1f}",
                    f"{ours.frac_of_peak:.0%}",
                    *gains(group, impls),
                ]
            )
    head = ["sequences x context", "threads", *latency_heads(impls)]
    return markdown([*head, "GB/s", "of read bandwidth", *gain_heads(impls)], rows)


def is_8b(group: Group) -> bool:
    """Whether the heads are those of an 8B model."""
    case = group["auto"].case
    return (case["num_heads"], case["num_kv_heads"], case["head_size"]) == (32, 8, 128)


def sizes(group: Group) -> tuple[int, int]:
    case = group["auto"].case
    return case["num_seqs"], case["seq_len"]


def num_tokens(group: Group) -> int:
    """Tokens of the step."""
    return group["auto"].case["num_seqs"] * group["auto"].case["query_len"]


def decode_ranges_table(results: Path) -> str:
    """Per head shape and thread count: the least, median and largest gain over contexts and batches."""
    intro = "Least, median and largest gain over all contexts and batch sizes measured:"
    return per_machine("decode", results, _decode_ranges_of, intro)


def _decode_ranges_of(found: list[Group]) -> str:
    impls, by_shape = impls_of(found), {}
    for group in found:
        case = group["auto"].case
        ratio = case["num_heads"] // case["num_kv_heads"]
        by_shape.setdefault((ratio, case["head_size"], group["auto"].num_threads), []).append(group)
    rows = []
    for (_, _, num_threads), same in sorted(by_shape.items()):
        row = [shape_text(same[0]["auto"]), str(num_threads), str(len(same))]
        for impl in impls[1:]:
            ratios = sorted(faster(group, impl) for group in same)
            row.append(", ".join(times(ratio) for ratio in (ratios[0], ratios[len(ratios) // 2], ratios[-1])))
        rows.append([*row, str(sum(faster(group, "auto") < 1 for group in same))])
    head = ["query/KV heads x head size", "threads", "cases", *gain_heads(impls), "slower than bf16"]
    return markdown(head, rows)


def isa_table(results: Path) -> str:
    """Decode with the kernels for older CPUs; vLLM always runs its best."""
    return per_machine("isa", results, _isa_of, "32 query heads, 8 KV heads, head size 128:")


def _isa_of(found: list[Group]) -> str:
    rows = []
    for group in sorted(found, key=lambda g: (g["auto"].num_threads, *sizes(g))):
        for impl, line in group.items():
            num_seqs, seq_len = sizes(group)
            row = [f"{num_seqs} x {seq_len}", str(line.num_threads), f"{impl.split()[0]}: {line.resolved_backend}"]
            row += [f"{line.median_us:,.0f}", f"{line.gb_per_s:.1f}"]
            rows.append([*row, times(group["auto"].median_us / line.median_us)])
    return markdown(["sequences x context", "threads", "cache: kernels", "us", "GB/s", "vs bf16"], rows)


def formats_table(results: Path) -> str:
    """Decode and prefill with fewer bits, against eight and against vLLM's own cache."""
    return per_machine("formats", results, _formats_of)


def write_formats_table(results: Path) -> str:
    """Writing with fewer bits, against eight and against vLLM's own cache."""
    return per_machine("write_formats", results, _formats_of)


def _formats_of(found: list[Group]) -> str:
    rows = []
    for group in sorted(found, key=lambda g: (shape_text(g["auto"]), num_tokens(g) > 1, g["auto"].num_threads)):
        ours = group["int8_custom"]
        for impl, line in group.items():
            name = impl.removeprefix("int8_custom").strip() or "k8v8"
            row = [_step_text(line)]
            row += [shape_text(line), str(line.num_threads), name if impl.startswith("int8_custom") else f"vLLM {impl}"]
            row += [f"{line.median_us:,.0f}", "-" if line.frac_of_peak is None else f"{line.frac_of_peak:.0%}"]
            rows.append([*row, times(ours.median_us / line.median_us), times(group["auto"].median_us / line.median_us)])
    head = ["step", "query/KV heads x head size", "threads", "format", "us", "of read", "vs k8v8"]
    return markdown([*head, "vs bf16"], rows)


def _step_text(line: Record) -> str:
    """What is timed: a batch of sequences by their context, or a prompt by its tokens."""
    if line.what == "write_formats":
        return f"write {line.case['num_seqs'] * line.case['query_len']:,}"
    decodes = line.case["query_len"] == 1
    return f"decode {batch_text(line.case)}" if decodes else f"prefill {line.case['seq_len']:,}"


def latency_table(what: str, unit: Callable[[Record], str], head: str, results: Path) -> str:
    """Times of a kind of case side by side."""
    return per_machine(what, results, partial(_latencies_of, unit, head))


def _latencies_of(unit: Callable[[Record], str], head: str, found: list[Group]) -> str:
    impls, rows = impls_of(found), []
    for group in sorted(found, key=lambda g: (shape_text(g["auto"]), g["auto"].num_threads, num_tokens(g))):
        rows.append(
            [
                unit(group["auto"]),
                shape_text(group["auto"]),
                str(group["auto"].num_threads),
                *latencies(group, impls),
                *gains(group, impls),
            ]
        )
    columns = [*latency_heads(impls), *gain_heads(impls)]
    if found[0]["auto"].case["dtype"] == "float32":
        columns = [text.replace("bf16", "fp32") for text in columns]
    return markdown([head, "query/KV heads x head size", "threads", *columns], rows)


def prefill_table(results: Path) -> str:
    prefill = latency_table("prefill", lambda line: str(line.case["seq_len"]), "prompt tokens", results)
    verify = latency_table(
        "verify", lambda line: f"{line.case['num_seqs']} x {line.case['seq_len']}", "sequences x context", results
    )
    return f"Prefill of one prompt:\n\n{prefill}\n\nVerification of 4 tokens per sequence:\n\n{verify}"


def write_table(results: Path) -> str:
    return latency_table(
        "write", lambda line: str(line.case["num_seqs"] * line.case["query_len"]), "tokens written", results
    )


def fp32_table(results: Path) -> str:
    """Decode and prefill of models in fp32."""
    return latency_table("fp32", _step_text, "step", results)


GPU_WHATS = ("decode", "verify", "write", "prefill")


def gpu_groups(results: Path) -> list[Group]:
    """The newest measurements on the GPU measured last."""
    found = by_case(line for what in GPU_WHATS for line in record.read(what, results) if line.cuda is not None)
    return [group for group in found if "int8_custom" in group]


def gpu_decode_groups(results: Path) -> list[Group]:
    """Decode of the shape of Llama-3.1-8B, 8 sequences of one length in blocks of 16, by context: for the plot."""
    shape = {"num_seqs": 8, "num_heads": 32, "num_kv_heads": 8, "head_size": 128, "block_size": 16}
    found = []
    for group in gpu_groups(results):
        ours = group["int8_custom"]
        if ours.what == "decode" and shape.items() <= ours.case.items() and "shortest" not in ours.case:
            found.append(group)
    return sorted(found, key=lambda group: group["int8_custom"].case["seq_len"])


def gpu_table(results: Path) -> str:
    """Every case on the GPU measured last, and how many times faster we are than each of the others there."""
    measured = gpu_groups(results)
    if not measured:
        return "_No records yet: `make gpu-check` on a machine with a GPU._"
    others = sorted({impl for group in measured for impl in group} - {"int8_custom"})
    rows = []
    for group in measured:
        ours = group["int8_custom"]
        ratios = [times(faster(group, impl)) if impl in group else "-" for impl in others]
        bandwidth = ["-", "-"] if ours.gb_per_s is None else [f"{ours.gb_per_s:,.0f}", f"{ours.frac_of_peak:.0%}"]
        rows.append(
            [f"{ours.what} {batch_text(ours.case)}", shape_text(ours), f"{ours.median_us:,.1f}", *bandwidth, *ratios]
        )
    head = [
        "sequences x context",
        "shape",
        "int8_custom, us",
        "GB/s",
        "of bandwidth",
        *(f"vs {impl}" for impl in others),
    ]
    plot = "![decode bandwidth against context length on a GPU](plots/decode_gpu.png)\n\n"
    return f"{plot if gpu_decode_groups(results) else ''}{markdown(head, rows)}\n\n{source(measured)}"


def missing(what: str) -> str:
    package = "engines" if what == "end_to_end" else "operators"
    return f"_Not measured yet: `python -m benchmarks.{package}`._"


TABLES: dict[str, Callable[[Path], str]] = {
    "decode": decode_table,
    "decode_ranges": decode_ranges_table,
    "isa": isa_table,
    "formats": formats_table,
    "gpu": gpu_table,
    "prefill": prefill_table,
    "write": write_table,
    "write_formats": write_formats_table,
    "fp32": fp32_table,
}

"""What README.md says of the records: the sentences below its title, and one row for each machine measured on.

Both are about decode attention with the heads of an 8B model and contexts of 4096 tokens and more; the cases one by
one are in the table `decode` of benchmarks/README.md.
"""

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import OURS
from benchmarks.report.accuracy_tables import find
from benchmarks.report.cuda.tables import bounds_sentence
from benchmarks.report.tables import faster, is_8b, machines, markdown, missing, sizes, times
from vllm_int8kv.evaluation.record import Group

LONG_CONTEXT = 4096
LINE_LENGTH = 120
WIDEST_FIRST = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
}
"""Instruction sets by what `record.device_name` calls them."""
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def long_contexts(results: Path) -> list[list[Group]]:
    """The cases that the headline is about, a list for each machine that has any."""
    found = ([group for group in same if is_8b(group) and is_long(group)] for same in machines("decode", results))
    return [same for same in found if same]


def is_long(group: Group) -> bool:
    return sizes(group)[1] >= LONG_CONTEXT


def flags(device: str) -> list[str]:
    """The instruction sets in the name of a machine."""
    return device.split(",")[-1].split()


def instruction_set(device: str) -> str:
    """The widest instruction set of a machine."""
    return next((name for flag, name in WIDEST_FIRST.items() if flag in flags(device)), "SSE2")


def has_fp8(device: str) -> bool:
    """Whether vLLM has its FP8 cache on a machine. Where it gives wrong results there are no records all the same."""
    return "avx512f" in flags(device)


def headline(results: Path) -> str:
    """How much faster decode attention is, for each instruction set measured on, and what it costs in accuracy."""
    by_isa: dict[str, list[Group]] = {}
    for same in long_contexts(results):
        by_isa.setdefault(instruction_set(same[0]["auto"].device), []).extend(same)
    if not by_isa:
        return missing("decode")
    clauses = []
    for isa, found in by_isa.items():
        against = "" if clauses else "as fast as with vLLM's bf16 cache on a CPU "
        clause = f"{spread(gains(found, 'auto'), in_words)} times {against}with {isa}"
        if fp8 := gains(found, "fp8"):
            clause += f" ({spread(fp8, in_words)} times as with its FP8 cache)"
        elif not has_fp8(found[0]["auto"].device):
            clause += " (where vLLM has no FP8 cache)"
        clauses.append(clause)
    speed = " and ".join(filter(None, [", ".join(clauses[:-1]), clauses[-1]]))
    text = (
        f"From {LONG_CONTEXT:,} tokens of context on, decode attention of an 8B model is {speed}. {_accuracy(results)}"
    )
    return textwrap.fill(text, LINE_LENGTH, break_long_words=False, break_on_hyphens=False)


def in_words(ratio: float) -> str:
    return times(ratio).removesuffix("x")


def _accuracy(results: Path) -> str:
    records = accuracy_record.latest(accuracy_record.read("engine", results / "accuracy"))
    lines = [find(records, impl, stress=1, dtype="float32") for impl in (OURS, "fp8")]
    if None in lines:
        return ""
    ours, fp8 = (f"{line.metrics['paths']['decode']['kl_per_token']['value']:.0e}" for line in lines)
    return f"It costs a KL divergence of {ours} per token, FP8 one of {fp8}."


def gains(found: Iterable[Group], impl: str) -> list[float]:
    """How many times faster we are than another implementation, where it was measured."""
    return [faster(group, impl) for group in found if impl in group]


def spread(values: list[float], show: Callable[[float], str] = times) -> str:
    """Least to largest."""
    return " to ".join(dict.fromkeys([show(min(values)), show(max(values))]))


def summary_table(results: Path) -> str:
    """A row per machine: decode attention from least to largest, and the whole engine; of GPUs what was computed."""
    found = long_contexts(results)
    if not found:
        return missing("decode")
    engines = {same[0]["auto"].device: same for same in machines("end_to_end", results)}
    rows = []
    for same in found:
        device = same[0]["auto"].device
        newest = max((group["int8_custom"] for group in same), key=lambda line: line.utc)
        fp8, shares = gains(same, "fp8"), [group["int8_custom"].frac_of_peak for group in same]
        rows.append(
            [
                f"{', '.join(device.split(', ')[:-1]) or device}, {instruction_set(device)}",
                spread(gains(same, "auto")),
                spread(fp8) if fp8 else "-" if has_fp8(device) else "not there",
                spread(shares, "{:.0%}".format),
                _engine(engines.get(device, [])),
                f"{newest.utc[:10]}, {newest.commit}",
            ]
        )
    head = ["CPU", "attention, vs bf16", "vs fp8", "of read bandwidth", "engine, output tokens/s", "attention measured"]
    conditions = _conditions([group for same in found for group in same])
    return f"{markdown(head, rows)}\n\n{conditions}\n\n{bounds_sentence(results)}"


def _engine(found: list[Group]) -> str:
    """Output tokens per second of the embedded model, and how many times those of the unquantized cache."""
    embedded = [group for group in found if is_long(group) and "smollm2" in group["auto"].case.get("model", "")]
    if not embedded:
        return "-"
    ours, auto = embedded[-1]["int8_custom"], embedded[-1]["auto"]
    ratio = times(ours.tok_per_s / auto.tok_per_s)
    return f"{ours.tok_per_s:.0f}, {ratio} {SHORT_DTYPES[auto.case['dtype']]}"


def _conditions(found: list[Group]) -> str:
    lines = [group["int8_custom"] for group in found]

    def either(values: Iterable[int]) -> str:
        return " or ".join(f"{value:,}" for value in sorted(set(values)))

    num_seqs, seq_len = (either(line.case[name] for line in lines) for name in ("num_seqs", "seq_len"))
    return (
        f"<sub>Attention: 32 query heads, 8 KV heads of 128, {num_seqs} sequences of {seq_len} tokens, "
        f"{either(line.num_threads for line in lines)} threads, from the least gain of these cases to the largest. "
        f"PyTorch {lines[-1].torch}, vLLM {lines[-1].vllm}; `benchmarks/results/decode.jsonl`, "
        "`benchmarks/results/end_to_end.jsonl`.</sub>"
    )


TABLES: dict[str, Callable[[Path], str]] = {"headline": headline, "summary": summary_table}

"""The tables of X in place of K and V, from `results/accuracy/xquant.jsonl` and `results/remat.jsonl`."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import AccuracyRecord
from benchmarks.accuracy.xquant.command import BLOCK_SIZES, STORE_BLOCK_SIZE
from benchmarks.accuracy.xquant.kv import BoundedCodec, SchemeCodec
from benchmarks.accuracy.xquant.latents import CrossLayerLatentCodec, LatentCodec, SteppedLatentCodec
from benchmarks.accuracy.xquant.rows import SECTIONS, Row
from benchmarks.report.accuracy_tables import find, source, texts
from benchmarks.report.tables import markdown, times
from benchmarks.roofline import roofline
from benchmarks.roofline.cost import (
    MACHINES,
    MODELS,
    Machine,
    Model,
    attention_slowdown,
    free_length,
    from_x,
    slowdown,
)
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.record import Record

MODEL, COPY = "smollm2", "smollm2, MHA copy"
NOT_SIMULATED = "_Not measured yet: `python -m benchmarks.accuracy xquant`._"
NOT_MEASURED = "_Not measured yet: `python -m benchmarks.roofline`._"


def k8v8_bytes(line: AccuracyRecord, multi_head: bool) -> int:
    """Bytes of a token in a K8V8 cache of all layers, with a KV head for every query head or as the model has it."""
    case = line.case
    num_heads = case["hidden_size"] // case["head_size"] if multi_head else case["num_kv_heads"]
    return case["num_layers"] * num_heads * 2 * (case["head_size"] + 2)


def stored_bytes(line: AccuracyRecord) -> float:
    """Packed where there is such a form, else behind zstandard in blocks of 64 tokens."""
    packed = line.metrics["bytes_per_token"]
    return line.metrics["zstd_bytes"][str(STORE_BLOCK_SIZE)] if packed is None else packed


def simulated_table(results: Path) -> str:
    """Codecs of X, and of K and V, by section."""
    records = accuracy_record.latest(accuracy_record.read("xquant", results / "accuracy"))
    if find(records, "k8v8", model=MODEL) is None:
        return NOT_SIMULATED
    head = ["", "bytes per token", "zstd", "entropy", "of K8V8, GQA", "MHA", "KL per token", "99.9% tail", "perplexity"]
    head.append("KL with K8V8 behind")
    blocks, newest = [], []
    for title, rows in SECTIONS.items():
        measured = [(row, line) for row in rows if (line := find(records, row.name, model=MODEL)) is not None]
        if measured:
            blocks += [f"**{title}**", markdown(head, [_simulated_row(row, line) for row, line in measured])]
            newest += [line for _, line in measured]
    last = max(newest, key=lambda line: line.utc)
    return "\n\n".join([*blocks, _by_block_size(records), texts(last), *_copy(records), source(last)])


def _simulated_row(row: Row, line: AccuracyRecord) -> list[str]:
    metrics, size = line.metrics, stored_bytes(line)
    packed, ideal = (metrics[name] for name in ("bytes_per_token", "ideal_bytes"))
    zstd = metrics["zstd_bytes"].get(str(STORE_BLOCK_SIZE))
    behind = metrics.get("kl_behind_k8v8")
    ratios = [f"{size / k8v8_bytes(line, multi_head=False):.2f}", _of_multi_head(row, line)]
    return [
        row.meaning,
        *("-" if count is None else f"{count:,.0f}" for count in (packed, zstd, ideal)),
        *ratios,
        *(f"{metrics[name]:.1e}" for name in ("kl_per_token", "kl_p999")),
        f"{metrics['perplexity_change']:+.2%}",
        "-" if behind is None else f"{behind:.1e}",
    ]


def _of_multi_head(row: Row, line: AccuracyRecord) -> str:
    """X does not grow with the number of KV heads, K and V do; latents are for models with fewer of them."""
    if isinstance(row.codec, LatentCodec | CrossLayerLatentCodec | SteppedLatentCodec):
        return "-"
    grows = isinstance(row.codec, SchemeCodec | BoundedCodec)
    return f"{stored_bytes(line) / k8v8_bytes(line, multi_head=not grows):.2f}"


def _by_block_size(records: list[AccuracyRecord]) -> str:
    """What zstandard makes of blocks of other sizes."""
    rows = []
    for line in (find(records, name, model=MODEL) for name in ("bound:0.05 per token", "xe:0.025", "xcle:0.05")):
        if line is not None:
            sizes = line.metrics["zstd_bytes"]
            rows.append([f"`{line.impl}`", *(f"{sizes[str(size)]:,.0f}" for size in BLOCK_SIZES)])
    return (
        f"**Bytes per token behind zstandard, by tokens of a block**\n\n{markdown(['', *map(str, BLOCK_SIZES)], rows)}"
    )


def _copy(records: list[AccuracyRecord]) -> list[str]:
    """The same on the copy of the model in which every query head has a KV head of its own."""
    pairs = [(line, find(records, line.impl, model=MODEL)) for line in records if line.case["model"] == COPY]
    cells = [
        f"{line.impl} {line.metrics['kl_per_token']:.1e} (here {other.metrics['kl_per_token']:.1e})"
        for line, other in pairs
        if other is not None
    ]
    return [f"KL on the MHA copy: {', '.join(cells)}."] if cells else []


def roofline_table(results: Path) -> str:
    """Computed for GPUs and measured CPUs, measured for a layer on CPUs."""
    lines = record.latest(record.read(roofline.WHAT, results))
    devices = list(dict.fromkeys(line.device for line in lines))
    if not devices:
        return NOT_MEASURED
    blocks = []
    machines = [*MACHINES, *(_machine(device, lines) for device in devices)]
    head = ["X in 8 bits, layer of", *(f"{batch} seqs" for batch in roofline.BATCHES)]
    head += [f"slowdown at {roofline.LENGTH:,}, {batch} seqs" for batch in roofline.BATCHES]
    for machine in machines:
        rows = [_computed_row(machine, model) for model in MODELS]
        title = f"**{machine.name}**, {machine.ridge:.0f} operations per byte ({machine.source}); free up to:"
        blocks += [title, markdown([*head, "attention alone"], rows)]
    for device in devices:
        same = [line for line in lines if line.device == device]
        blocks += [f"Measured, one sequence, **{device}**:", _measured(same), _source(same)]
    return "\n\n".join(blocks)


def _computed_row(machine: Machine, model: Model) -> list[str]:
    cost = from_x(model, 8)
    lengths = [free_length(machine, model, cost, batch) for batch in roofline.BATCHES]
    slower = [slowdown(machine, model, cost, roofline.LENGTH, batch) for batch in roofline.BATCHES]
    return [
        model.name,
        *("always" if math.isinf(length) else f"{length:,.0f}" for length in lengths),
        *map(times, slower),
        times(attention_slowdown(machine, model, cost)),
    ]


def _machine(device: str, lines: Sequence[Record]) -> Machine:
    """A CPU by its measured peaks."""
    same = [line for line in lines if line.device == device]
    fastest = max(line.metrics["flops_per_s"] for line in same if line.impl == roofline.MATMUL)
    bandwidth = max(line.read_gb_per_s for line in same)
    return Machine(device, fastest, bandwidth * 1e9, f"{fastest / 1e9:,.0f} GFLOP/s, {bandwidth:.0f} GB/s measured")


def _measured(lines: Sequence[Record]) -> str:
    by_case = {
        (line.case["model"], line.case["seq_len"], line.impl): line for line in lines if line.impl != roofline.MATMUL
    }
    bandwidth = max(line.read_gb_per_s for line in lines)
    rows = []
    for model in MODELS:
        free = free_when_measured(model, by_case, bandwidth)
        for seq_len in roofline.SEQ_LENS:
            pair = [by_case.get((model.name, seq_len, impl)) for impl in (roofline.FROM_X, roofline.FROM_KV)]
            if None in pair:
                continue
            x_us, kv_us = (line.median_us for line in pair)
            rows.append([model.name, f"{seq_len:,}", f"{x_us:,.0f}", f"{kv_us:,.0f}", times(x_us / kv_us), free])
    return markdown(["layer of", "tokens", "from X, us", "from K and V, us", "ratio", "free up to"], rows)


def free_when_measured(model: Model, by_case: dict[tuple[str, int, str], Record], bandwidth: float) -> str:
    """Where attention from X takes longer than from K and V by the time that the layer's weights take to be read."""
    reading_us = model.weight_bytes / bandwidth / 1e3
    points = [(0, 0.0)]
    for seq_len in roofline.SEQ_LENS:
        pair = [by_case.get((model.name, seq_len, impl)) for impl in (roofline.FROM_X, roofline.FROM_KV)]
        if None not in pair:
            points.append((seq_len, pair[0].median_us - pair[1].median_us))
    for (shorter, less), (longer, more) in pairwise(points):
        if more > reading_us:
            return f"{shorter + (longer - shorter) * (reading_us - less) / (more - less):,.0f}"
    return f"more than {points[-1][0]:,}"


def _source(lines: Sequence[Record]) -> str:
    newest = max(lines, key=lambda line: line.utc)
    commit = newest.commit + (" with local changes" if newest.dirty else "")
    return (
        f"<sub>{newest.utc[:10]}; {newest.num_threads} threads; PyTorch {newest.torch}; commit {commit}; "
        f"`benchmarks/results/{newest.what}.jsonl`.</sub>"
    )


TABLES: dict[str, Callable[[Path], str]] = {"xquant": simulated_table, "roofline": roofline_table}

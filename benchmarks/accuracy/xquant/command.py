"""`python -m benchmarks.accuracy xquant`: X in place of K and V (XQuant, arXiv 2508.10395), and K and V beside it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.texts import texts
from vllm_int8kv.commands.models import resolve
from vllm_int8kv.evaluation import record

BLOCK_SIZES = (16, 32, 64, 128)
"""Tokens of a block that is entropy-coded on its own, where codes have no other form."""
STORE_BLOCK_SIZE = 64
"""The same for codes that also have a form without."""


def score_codecs(
    model: Annotated[str, typer.Option(help="folder of a Llama-like model, or smollm2")] = "smollm2",
    name: Annotated[str, typer.Option(help="of the model in the records; default: as --model")] = "",
    tokens: Annotated[int, typer.Option(help="of each text")] = 1024,
    only: Annotated[str, typer.Option(help="names of rows, or their beginnings; empty for all")] = "",
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score codecs of X without an engine; one line per codec."""
    from transformers import AutoTokenizer

    from benchmarks.accuracy.xquant.remat import RematSimulator
    from benchmarks.accuracy.xquant.rows import ROWS

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    wanted = tuple(filter(None, only.split(",")))
    if unknown := [begin for begin in wanted if not any(row.startswith(begin) for row in ROWS)]:
        sys.exit(f"--only: no row begins with {unknown[0]!r}; there are {', '.join(ROWS)}")
    folder, chosen = resolve(model), texts()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    simulator = RematSimulator(folder, [tokenizer.encode(text)[:tokens] for text in chosen.values()])
    sizes = {text: ids.shape[1] for text, ids in zip(chosen, simulator.token_ids, strict=True)}
    config = simulator.model.config
    case = {
        "model": name or model,
        "texts": sizes,
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": config.num_key_value_heads,
        "head_size": simulator.layers[0].attention.head_dim,
        "hidden_size": config.hidden_size,
    }
    console = Console(stderr=True)
    for row in track([row for row in ROWS.values() if not wanted or row.name.startswith(wanted)], console=console):
        metrics = measure(simulator, row, list(chosen))
        accuracy_record.append("xquant", case, row.name, metrics, out)
        console.print(f"{row.name}: KL {metrics['kl_per_token']:.2e}, bytes {metrics['bytes_per_token']}")


def measure(simulator: Any, row: Any, names: list[str]) -> dict[str, Any]:
    """The metrics of a row of `rows.py`: bytes are of all layers, per token, with scales."""
    from benchmarks.accuracy.simulator import summarize
    from benchmarks.accuracy.xquant import entropy
    from benchmarks.accuracy.xquant.kv import SchemeCodec
    from benchmarks.accuracy.xquant.rows import BEHIND_K8V8

    score = simulator.score(row.codec)
    metrics = summarize(dict(zip(names, score.divergences, strict=True)))
    metrics |= {"perplexity_change": score.perplexity_change, "zstd_bytes": {}, "ideal_bytes": None}
    if isinstance(row.codec, SchemeCodec):
        metrics["bytes_per_token"] = row.codec.bytes_per_token(simulator)
    else:
        metrics["bytes_per_token"] = entropy.fixed_bytes(score.coded)
        sizes = BLOCK_SIZES if metrics["bytes_per_token"] is None else (STORE_BLOCK_SIZE,)
        metrics["zstd_bytes"] = {str(size): entropy.zstd_bytes(score.coded, size) for size in sizes}
        metrics["ideal_bytes"] = entropy.ideal_bytes(score.coded)
    if row.name in BEHIND_K8V8:
        behind = simulator.score(row.codec, behind_k8v8=True)
        metrics["kl_behind_k8v8"] = summarize(dict(zip(names, behind.divergences, strict=True)))["kl_per_token"]
    return metrics

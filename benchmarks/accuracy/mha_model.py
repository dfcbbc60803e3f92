"""A model without grouped queries that answers like another one: each KV head once per query head that reads it.

    python -m benchmarks.accuracy.mha_model smollm2 /tmp/mha

The rows of W_k and W_v, and of their biases, of each KV head are repeated for its query heads, and the configuration
gets as many KV heads as query heads. Every query head meets the keys and values it met before, so the function stays
the same, while the KV cache grows by the number of queries per KV head, to what a model of its width has that was
trained without grouped queries.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file

from vllm_int8kv.commands.models import resolve


def make_mha_model(source: Path, target: Path) -> Path:
    """Write a copy of a Hugging Face folder in which every query head has a KV head of its own.

    Args:
        source: a Llama-like model: `k_proj`, `v_proj`, the query heads of a KV head next to one another.
        target: a new folder.

    Raises:
        ValueError: the model has no grouped queries, or layers without a `k_proj` and a `v_proj`.
    """
    config = json.loads((source / "config.json").read_text())
    num_heads = config["num_attention_heads"]
    num_kv_heads = config.get("num_key_value_heads") or num_heads
    if num_kv_heads == num_heads:
        raise ValueError(f"{source.name} has no grouped queries: {num_heads} query heads and as many KV heads")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    projections = 0
    for file in sorted(source.glob("*.safetensors")):
        weights = load_file(file)
        for name, weight in weights.items():
            module = name.rpartition(".")[0]
            if module.endswith((".k_proj", ".v_proj")):
                weights[name] = _repeat_heads(weight, num_kv_heads, num_heads // num_kv_heads)
                projections += name.endswith(".weight")
        save_file(weights, target / file.name, metadata={"format": "pt"})
    if projections != 2 * config["num_hidden_layers"]:
        raise ValueError(
            f"{source.name} has {projections} weights of k_proj and v_proj in {config['num_hidden_layers']} layers; "
            "expected one of each per layer"
        )
    (target / "config.json").write_text(json.dumps(config | {"num_key_value_heads": num_heads}, indent=2) + "\n")
    return target


def _repeat_heads(rows: torch.Tensor, num_kv_heads: int, num_queries_per_kv: int) -> torch.Tensor:
    """A weight `[num_kv_heads * head_size, ...]` or bias with each head `num_queries_per_kv` times in a row."""
    return rows.unflatten(0, (num_kv_heads, -1)).repeat_interleave(num_queries_per_kv, dim=0).flatten(0, 1)


def main(
    model: Annotated[str, typer.Argument(help="folder of a Llama-like model, or smollm2")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Write a copy of a model that has as many KV heads as query heads and the same answers."""
    try:
        make_mha_model(Path(resolve(model)), target)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)

"""A model that answers like another bit for bit while its keys carry outliers: the stress test of a KV cache.

    python -m benchmarks.accuracy.stress_model smollm2 /tmp/stress --factor 128

In chosen layers a few RoPE pairs of the rows of W_k and its bias are scaled by a factor and the same rows of W_q by
its inverse. RoPE only mixes the two channels of a pair, so q . k is unchanged; with a power of two no rounding
changes either, not even in bf16. Real models look like this: keys of Qwen2.5-7B reach tens of times their median in
the first and the last layer.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file, save_file

from vllm_int8kv.commands.models import resolve

PAIRS = (5, 20)
LAYERS = (0, 9, 19, 29)


def make_stress_model(
    source: Path, target: Path, factor: int, layers: Sequence[int] = LAYERS, pairs: Sequence[int] = PAIRS
) -> Path:
    """Write a copy of a Hugging Face folder in which keys carry outliers.

    Args:
        source: a Llama-like model: `q_proj`, `k_proj`, RoPE over the whole head in two halves.
        target: a new folder.
        factor: a power of two.
        layers, pairs: what is scaled, in every KV head; pair d is the channels d and d + head_size / 2.

    Raises:
        ValueError: the factor is no power of two, or the model has no such layers or pairs, or norms of Q and K.
    """
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"--factor must be a power of two, so that nothing is rounded, got {factor}")
    config = json.loads((source / "config.json").read_text())
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // num_heads
    if bad := [pair for pair in pairs if pair >= head_size // 2]:
        raise ValueError(f"pair {bad[0]} does not exist; the model has {head_size // 2} pairs per head")
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json"))
    found = set()
    for file in sorted(source.glob("*.safetensors")):
        weights = load_file(file)
        if norms := [name for name in weights if "self_attn.k_norm" in name]:
            raise ValueError(f"{source.name} normalizes keys ({norms[0]}), which undoes what is done to their weights")
        for layer in layers:
            for name, heads, scale in (("q_proj", num_heads, 1 / factor), ("k_proj", num_kv_heads, factor)):
                for part in ("weight", "bias"):
                    key = f"model.layers.{layer}.self_attn.{name}.{part}"
                    if key not in weights:
                        continue
                    found.add(layer)
                    by_pair = weights[key].view(heads, 2, head_size // 2, -1)
                    by_pair[:, :, list(pairs)] *= scale
        save_file(weights, target / file.name, metadata={"format": "pt"})
    if missing := sorted(set(layers) - found):
        raise ValueError(f"{source.name} has no self_attn.k_proj in layer {missing[0]}")
    return target


def main(
    model: Annotated[str, typer.Argument(help="folder of a Llama-like model, or smollm2")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    factor: Annotated[int, typer.Option(help="how many times larger the outliers are; a power of two")] = 128,
) -> None:
    """Write a copy of a model whose keys carry outliers and whose answers are the same."""
    try:
        make_stress_model(Path(resolve(model)), target, factor)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    typer.run(main)

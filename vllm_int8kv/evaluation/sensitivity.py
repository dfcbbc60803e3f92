"""`vllm-int8kv eval --sensitivity`: what each layer loses to INT8, and which to leave unquantized.

One engine with the INT8 cache scores the texts by prefill, with exact attention in the layers that are to count as
unquantized (`engines/sensitivity_engine.py`). e_o is the relative error of a layer's attention output when its own K
and V went through the cache and everything before it is exact (KVTuner, arXiv 2502.04420, with norms in place of
elementwise ratios); the KL divergence per token is that of the whole model with only this layer quantized. A layer that
reads another layer's cache has none of its own to leave unquantized: it counts as a part of that layer.
"""

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from vllm_int8kv.cache.formats import FORMATS, K8V8, native_content_bytes
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.engines.process import run_engine
from vllm_int8kv.evaluation.eval_plan import EvalPlan
from vllm_int8kv.evaluation.progress import ProgressDisplay

STAGE_SECONDS = {"load": 15, "sample": 60, "errors": 10, "layers": 120}
OUTLIER_SHARE = 4.0
"""A layer is suggested for the skip list if its KL is this many times the median layer's."""


@dataclass(frozen=True)
class CacheShape:
    """The cache of one layer."""

    num_kv_heads: int
    head_size: int
    itemsize: int
    """Bytes of an element of the unquantized cache."""
    cache_format: str = K8V8.name

    @property
    def native_bytes(self) -> int:
        """Bytes per token without quantization."""
        return self.num_kv_heads * native_content_bytes(self.head_size, self.itemsize)

    @property
    def int8_bytes(self) -> int:
        """Bytes per token in the INT8 cache."""
        return self.num_kv_heads * FORMATS[self.cache_format].content_bytes(self.head_size)


def measure_layers(plan: EvalPlan, console: Console, *, name: str, verbose: bool = False) -> dict[str, Any]:
    """Score every layer.

    Args:
        plan: model, texts and sizes, and in `int8_kv` options of the INT8 cache.
        name: what the report calls the model.
        verbose: show the log of vLLM on stderr instead of a progress bar.

    Returns:
        The report that `--json` writes: `layers`, each with `layer`, `e_o`, `kl_per_token`, the most sensitive first;
        `sharing_layers`, each with `layer` and `reads_cache_of`, the layer in whose cache its keys and values are;
        `kl_all_layers`; and what `suggest` returns.

    Raises:
        EngineError: the engine failed.
        ValueError: a text is too short to be scored.
    """
    has_texts = bool(plan.texts or plan.token_ids)
    shares = {stage: seconds for stage, seconds in STAGE_SECONDS.items() if not (stage == "sample" and has_texts)}
    with tempfile.TemporaryDirectory(prefix="vllm-int8kv-") as folder, ProgressDisplay(console, verbose) as progress:
        own = asdict(replace(plan, folder=folder, kv_cache_dtype=KV_CACHE_DTYPE))
        with progress.engine("sensitivity", shares) as stages:
            result = run_engine("vllm_int8kv.evaluation.engines.sensitivity_engine", own, stages.update, verbose)
    layers = sorted(result.pop("layers"), key=lambda layer: -layer["kl_per_token"])
    return {"model": name, **result, "layers": layers, **suggest(layers)}


def suggest(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which layers to leave unquantized, and at what price.

    Args:
        layers: of each `layer`, its index, `kl_per_token`, and `shape`, the fields of its `CacheShape`.

    Returns:
        policy, `{layer: "auto"}` for every layer whose KL is at least `OUTLIER_SHARE` times the median;
        kl_removed, their share of the sum of all layers' KL; capacity_ratio and capacity_ratio_with_policy, tokens
        in the same memory against an unquantized cache.
    """
    divergences = sorted(layer["kl_per_token"] for layer in layers)
    threshold = OUTLIER_SHARE * divergences[len(divergences) // 2]
    skipped = [layer for layer in layers if layer["kl_per_token"] >= threshold > 0]
    policy = {layer["layer"]: "auto" for layer in sorted(skipped, key=lambda layer: layer["layer"])}
    shapes = {layer["layer"]: CacheShape(**layer["shape"]) for layer in layers}
    native = sum(shape.native_bytes for shape in shapes.values())
    int8 = sum(shape.int8_bytes for shape in shapes.values())
    mixed = sum(shape.native_bytes if index in policy else shape.int8_bytes for index, shape in shapes.items())
    return {
        "policy": policy,
        "kl_removed": sum(layer["kl_per_token"] for layer in skipped) / (sum(divergences) or 1.0),
        "capacity_ratio": native / int8,
        "capacity_ratio_with_policy": native / mixed,
    }


def write_policy(report: Mapping[str, Any], path: Path) -> None:
    """Write every layer's format to a file that the option `layer_policy` reads."""
    formats = {layer["layer"]: layer["shape"]["cache_format"] for layer in report["layers"]} | report["policy"]
    path.write_text(yaml.safe_dump(dict(sorted(formats.items()))))


def print_layers(report: Mapping[str, Any], console: Console) -> None:
    """Show a report of `measure_layers`."""
    table = Table(title=f"{report['model']}: layers by what they lose to INT8")
    for column in ("layer", "KL per token (nats)", "e_o"):
        table.add_column(column, justify="right")
    for layer in report["layers"]:
        table.add_row(str(layer["layer"]), f"{layer['kl_per_token']:.1e}", f"{layer['e_o']:.1e}")
    for layer in report["sharing_layers"]:
        table.add_row(str(layer["layer"]), f"reads the cache of layer {layer['reads_cache_of']}", "-")
    console.print(table)
    console.print(f"All layers quantized: KL {report['kl_all_layers']:.1e} per token.")
    if not report["policy"]:
        console.print(f"No layer stands out ({OUTLIER_SHARE:.0f} times the median): quantize all of them.")
        return
    console.print(
        f"Leave unquantized: {', '.join(map(str, report['policy']))}. They cause {report['kl_removed']:.0%} of the "
        f"divergence; without them {report['capacity_ratio_with_policy']:.2f}x the tokens fit instead of "
        f"{report['capacity_ratio']:.2f}x."
    )


def draw_layers(report: Mapping[str, Any], path: Path) -> None:
    """Plot the KL divergence of every layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    draw_bars(report["layers"], report["policy"], axes)
    axes.set_title(f"{report['model']}: divergence with one layer in INT8")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_bars(layers: Sequence[Mapping[str, Any]], skipped: Collection[int], axes: Any) -> None:
    """Draw the KL divergence of layers as bars into matplotlib axes, the skipped ones in red."""
    layers = sorted(layers, key=lambda layer: layer["layer"])
    colors = ["tab:red" if layer["layer"] in skipped else "tab:blue" for layer in layers]
    axes.bar([layer["layer"] for layer in layers], [layer["kl_per_token"] for layer in layers], color=colors)
    axes.set_xlabel("layer")
    axes.set_ylabel("KL per token, nats")

"""What KV cache formats cost in accuracy, recorded in `results/accuracy/`.

    python -m benchmarks.accuracy engine                     # KV cache dtypes, through vLLM (vllm-int8kv eval)
    python -m benchmarks.accuracy engine --stress 128        # the same on a model whose keys carry outliers
    python -m benchmarks.accuracy formats                    # cache formats of this plugin and fp8, on both models
    python -m benchmarks.accuracy layers                     # what each layer loses (vllm-int8kv eval --sensitivity)
    python -m benchmarks.accuracy schemes                    # quantization schemes, simulated in PyTorch
    python -m benchmarks.accuracy tune                       # bits by layer (vllm-int8kv tune), and KVTuner's claims
    python -m benchmarks.accuracy xquant                     # the input of attention in place of K and V, simulated
    python -m benchmarks.accuracy stored                     # prefixes from the KV store, simulated

Four texts (`texts.py`) are scored; three have more tokens than are used, the prose has about 1,800.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.accuracy_record import CACHES, FORMATS, OURS
from benchmarks.accuracy.stress_model import make_stress_model
from benchmarks.accuracy.texts import texts
from benchmarks.accuracy.tuning import tune_model
from benchmarks.accuracy.xquant.command import score_codecs
from benchmarks.accuracy.xquant.stored import simulate_store
from benchmarks.operators.peers import name_missing
from vllm_int8kv.commands.models import resolve
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation import record

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
console = Console()


@contextmanager
def stressed(model: str, stress: int) -> Iterator[Path]:
    """The folder of a model, for `stress` above 1 of a copy whose keys carry outliers."""
    path = Path(resolve(model))
    with tempfile.TemporaryDirectory() as folder:
        yield make_stress_model(path, Path(folder, "model"), stress) if stress > 1 else path


def stress_factors(text: str) -> list[int]:
    """The factors of `--stress` where a command takes several."""
    parts = text.split(",")
    if wrong := [part for part in parts if not part.isdecimal() or int(part).bit_count() != 1]:
        raise typer.BadParameter(f"--stress must be powers of two like 1,128, got {wrong[0]!r}")
    return [int(part) for part in parts]


@app.command()
def engine(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    dtypes: Annotated[
        str, typer.Option(help="caches, as vllm-int8kv eval takes them; those of vLLM are left out where they fail")
    ] = ",".join(CACHES),
    tokens: Annotated[int, typer.Option(help="of each text")] = 2048,
    dtype: Annotated[str, typer.Option(help="of weights and arithmetic")] = "float32",
    stress: Annotated[int, typer.Option(help="factor of the outliers put into the keys; 1 for none")] = 1,
    paths: Annotated[str, typer.Option(help="how scored tokens read the cache")] = "decode,prefill,chunked,prefix",
    generate_tokens: Annotated[int, typer.Option(help="length of the greedy answers compared")] = 128,
    needle_lengths: Annotated[str, typer.Option(help="contexts in which to hide a number")] = "512,1024,2048",
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score KV cache dtypes through vLLM; one line per cache."""
    from vllm_int8kv.evaluation.cache_spec import CacheSpec
    from vllm_int8kv.evaluation.eval_plan import make_plan
    from vllm_int8kv.evaluation.evaluate import evaluate

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    options = {"paths": paths, "needle_lengths": needle_lengths, "engine_options": "{}"}
    sizes = {"max_tokens": tokens, "generate_tokens": generate_tokens, "dtype": dtype}
    chosen = texts()
    with stressed(model, stress) as path:
        plan = replace(make_plan([], model=str(path), **options, **sizes), texts=tuple(chosen.values()))
        caches = [CacheSpec.parse(name, "--dtypes") for name in dtypes.split(",")]
        optional = [cache.name for cache in caches if cache.kv_cache_dtype not in ("auto", KV_CACHE_DTYPE)]
        report = evaluate(plan, caches, Console(stderr=True), name=model, optional=optional)
    name_missing(report["left_out"])
    case = {
        "model": model,
        "stress": stress,
        "dtype": dtype,
        "texts": dict(zip(chosen, report["text_tokens"].values(), strict=True)),
    }
    for name, metrics in report["caches"].items():
        accuracy_record.append("engine", case, name, metrics, out)
        kl = metrics["paths"]["decode"]["kl_per_token"]
        console.print(f"{name}: KL {kl['value']:.2e} ({kl['low']:.2e} to {kl['high']:.2e})")


@app.command()
def formats(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    names: Annotated[str, typer.Option(help="cache formats, comma-separated")] = ",".join(FORMATS),
    tokens: Annotated[int, typer.Option(help="of each text")] = 2048,
    stress: Annotated[str, typer.Option(help="factors of the outliers put into the keys; 1 for none")] = "1,128",
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score cache formats and vLLM's fp8 cache by decode steps in fp32; one line per cache and factor."""
    from vllm_int8kv.evaluation.cache_spec import CacheSpec
    from vllm_int8kv.evaluation.eval_plan import make_plan
    from vllm_int8kv.evaluation.evaluate import evaluate

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    caches = [CacheSpec.parse(f"{KV_CACHE_DTYPE}:format={name}", "--names") for name in names.split(",")]
    caches.append(CacheSpec("fp8", "fp8"))
    chosen = texts()
    for factor in stress_factors(stress):
        with stressed(model, factor) as path:
            options = {"paths": "decode", "needle_lengths": "", "engine_options": "{}"}
            plan = make_plan([], model=str(path), max_tokens=tokens, generate_tokens=0, dtype="float32", **options)
            plan = replace(plan, texts=tuple(chosen.values()))
            report = evaluate(plan, caches, Console(stderr=True), name=model, optional=["fp8"])
        name_missing(report["left_out"])
        sizes = dict(zip(chosen, report["text_tokens"].values(), strict=True))
        case = {"model": model, "stress": factor, "dtype": "float32", "texts": sizes}
        for name, metrics in report["caches"].items():
            if name == "auto":
                continue
            impl = name.removeprefix(f"{KV_CACHE_DTYPE}:format=")
            accuracy_record.append("formats", case, impl, metrics, out)
            kl = metrics["paths"]["decode"]["kl_per_token"]
            console.print(f"{impl}, stress {factor}: KL {kl['value']:.2e} ({kl['low']:.2e} to {kl['high']:.2e})")


@app.command()
def layers(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    cache: Annotated[str, typer.Option(help="int8_custom and its options, as vllm-int8kv eval takes them")] = OURS,
    tokens: Annotated[int, typer.Option(help="of each text")] = 1024,
    dtype: Annotated[str, typer.Option(help="of weights and arithmetic")] = "float32",
    stress: Annotated[int, typer.Option(help="factor of the outliers put into the keys; 1 for none")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score the model with one layer in INT8 at a time; one line for all layers."""
    from vllm_int8kv.evaluation.cache_spec import CacheSpec
    from vllm_int8kv.evaluation.eval_plan import make_plan
    from vllm_int8kv.evaluation.sensitivity import measure_layers, print_layers

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    chosen = texts()
    with stressed(model, stress) as path:
        plan = make_plan(
            [], paths="prefill", needle_lengths="", engine_options="{}", model=str(path), max_tokens=tokens, dtype=dtype
        )
        plan = replace(plan, texts=tuple(chosen.values()), int8_kv=CacheSpec.parse(cache, "--cache").int8_kv)
        report = measure_layers(plan, Console(stderr=True), name=model)
    print_layers(report, console)
    sizes = dict(zip(chosen, report.pop("text_tokens"), strict=True))
    case = {"model": model, "stress": stress, "dtype": report.pop("dtype"), "texts": sizes}
    accuracy_record.append("layers", case, cache, report, out)


@app.command()
def schemes(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="of each text")] = 1024,
    stress: Annotated[str, typer.Option(help="factors of the outliers put into the keys; 1 for none")] = "1,128",
    only: Annotated[str, typer.Option(help="names of schemes; empty for all")] = "",
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score quantization schemes without an engine; one line per scheme and factor."""
    from transformers import AutoTokenizer

    from benchmarks.accuracy.schemes import SCHEMES
    from benchmarks.accuracy.simulator import Simulator, summarize

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    names = {scheme.name for scheme in SCHEMES}
    if unknown := sorted(set(filter(None, only.split(","))) - names):
        sys.exit(f"--only: no scheme {unknown[0]!r}; there are {', '.join(sorted(names))}")
    factors = stress_factors(stress)
    folder, chosen = resolve(model), texts()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    simulator = Simulator(folder, [tokenizer.encode(text)[:tokens] for text in chosen.values()])
    sizes = {name: ids.shape[1] for name, ids in zip(chosen, simulator.token_ids, strict=True)}
    config = simulator.model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    todo = [(scheme, s) for scheme in SCHEMES for s in factors if not only or scheme.name in only.split(",")]
    for scheme, factor in track(todo, console=Console(stderr=True)):
        weight_errors, output_errors = simulator.layer_errors(scheme, factor)
        metrics = summarize(dict(zip(chosen, simulator.divergences(scheme, factor), strict=True))) | {
            "e_a": weight_errors,
            "e_o": output_errors,
            "bytes_per_token": scheme.bytes_per_token(head_size),
            "bits_per_element": scheme.bits_per_element(head_size),
        }
        accuracy_record.append("schemes", {"model": model, "stress": factor, "texts": sizes}, scheme.name, metrics, out)
        console.print(
            f"{scheme.name}, stress {factor}: KL {metrics['kl_per_token']:.2e}, 99.9% tail {metrics['kl_p999']:.2e}"
        )


app.command("tune")(tune_model)
app.command("xquant")(score_codecs)
app.command("stored")(simulate_store)

if __name__ == "__main__":
    app()

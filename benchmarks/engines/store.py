"""What the KV store gives and costs: `python -m benchmarks.engines.store`.

For every codec one engine computes prompts and saves them, and another one, in a process of its own, finds them: time
to the first token, bytes on disk, speed of the codec, and the KL divergence of what is decoded behind a restored prefix
from an engine that has nothing but an unquantized cache. One engine without a store is what both are compared with.

    python -m benchmarks.engines.store --steps --codecs exact,k6v4,bound:0.2    what saving costs the steps meanwhile
    python -m benchmarks.engines.store --scores --windows 6 --codecs k6v4,k4v4  only the divergence, of more text
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.mha_model import make_mha_model
from benchmarks.accuracy.texts import texts, windows
from vllm_int8kv.commands.models import resolve
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.engines.process import EngineProcess
from vllm_int8kv.evaluation.progress import ProgressDisplay
from vllm_int8kv.evaluation.scoring import summarize
from vllm_int8kv.store import index

BLOCK_SIZE = 32
CODECS = "exact,k6v4,k4v4,k4v4+zstd,bound:0.1,bound:0.2,bound:0.4,x,x8,x6,xcl8,xcl4,xbound:0.02,xbound:0.1,xsvd:0.0125"
MHA = ", a KV head for each query head"
PREFIX_TOKENS = 1024
SCORED_TOKENS = 256
NO_STORE = "no store"


@dataclass(frozen=True)
class StorePlan:
    """What one engine does."""

    model: str
    dtype: str
    cache: str = KV_CACHE_DTYPE
    """as `--dtypes` of eval spells it"""
    folder: str = ""
    codec: str = "exact"
    is_cold: bool = False
    """the store is empty"""
    lengths: tuple[int, ...] = ()
    """of prompts whose first token is timed"""
    long_text: str = ""
    texts: tuple[list[int], ...] = ()
    """tokens; those behind `prefix_tokens` are scored"""
    prefix_tokens: int = PREFIX_TOKENS
    scored_tokens: int = SCORED_TOKENS
    scores: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    is_reference: bool = False
    times_steps: bool = False
    """of an engine that saves all the time"""


def run(plan: StorePlan, progress: ProgressDisplay, name: str) -> dict[str, Any]:
    """Carry out a plan in a process of its own."""
    stages = {"load": 20, "run": 60}
    module, what = "benchmarks.engines.store_engine", f"the engine of {name}"
    with progress.engine(name, stages) as shown, EngineProcess(module, what, shown.update) as engine:
        return engine.ask(asdict(plan), is_last=True)


def measure_steps(plan: StorePlan, codecs: str, case: dict[str, Any], progress: ProgressDisplay, out: Path) -> None:
    """Record the steps of engines that save in every other pair of periods, against the periods beside those."""
    case = {key: case[key] for key in ("model", "dtype", "block_size")}
    for codec in codecs.split(","):
        with tempfile.TemporaryDirectory() as root:
            periods = run(replace(plan, folder=root, codec=codec), progress, codec)["steps"]
        metrics: dict[str, list[float]] = {}
        for own in periods:
            seconds = {"decode": float(np.median(own["decode"])), "prefill": own["prefill"]}
            seconds["all"] = own["prefill"] + sum(own["decode"])
            for kind, value in seconds.items():
                metrics.setdefault(f"{kind}_saving_s" if own["saves"] else f"{kind}_s", []).append(value)
            if own["saves"]:
                metrics.setdefault("rest_s", []).append(own["rest"])
        accuracy_record.append("store_steps", case, codec, metrics, out)


def main(
    model: Annotated[str, typer.Option(help="folder of a model, or smollm2")] = "smollm2",
    codecs: Annotated[str, typer.Option(help="comma-separated")] = CODECS,
    multi_head: Annotated[
        bool, typer.Option("--multi-head", help="a copy of the model with a KV head for each query head")
    ] = False,
    lengths: Annotated[str, typer.Option(help="tokens of the prompts")] = "2000,4000,6000",
    dtype: Annotated[str, typer.Option(help="of weights and arithmetic")] = "float32",
    num_windows: Annotated[int, typer.Option("--windows", help="of 1,280 tokens, of each text that has them")] = 1,
    scores: Annotated[bool, typer.Option("--scores", help="only the divergence of codecs")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="only how long steps take while blocks are saved")] = False,
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Time and score prompts from the store, one line per codec."""
    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    path = str(resolve(model))
    chosen = windows(AutoTokenizer.from_pretrained(path).encode, PREFIX_TOKENS + SCORED_TOKENS, num_windows)
    sizes = tuple(int(length) for length in lengths.split(","))
    long_text = "\n".join(text for name, text in texts().items() if name != "prose")
    case = {
        "model": model + (MHA if multi_head else ""),
        "dtype": dtype,
        "block_size": BLOCK_SIZE,
        "lengths": list(sizes),
        "texts": list(chosen),
    }
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder, ProgressDisplay(console) as progress:
        if multi_head:
            path = str(make_mha_model(Path(path), Path(folder, "model")))
        if steps:
            measure_steps(StorePlan(path, dtype, long_text=long_text, times_steps=True), codecs, case, progress, out)
            return
        references = tuple(str(Path(folder, f"reference-{text}.npy")) for text in chosen)

        def scored(plan: StorePlan, label: str) -> StorePlan:
            scores = tuple(str(Path(folder, f"{label}-{text}.npy")) for text in chosen)
            return replace(plan, texts=tuple(chosen.values()), references=references, scores=scores)

        def saving(plan: StorePlan) -> StorePlan:
            """Of the texts the prefixes only, and a token behind that somebody asks for."""
            beginnings = tuple(token_ids[: PREFIX_TOKENS + 2] for token_ids in plan.texts)
            return replace(plan, texts=beginnings, is_cold=True)

        def kl(plan: StorePlan) -> dict[str, Any]:
            rows = slice(PREFIX_TOKENS + 1, None)  # the first ones are not scored
            got, want = ([np.load(path)[rows] for path in paths] for paths in (plan.scores, exact.scores))
            return summarize(got, want)

        base = StorePlan(path, dtype)
        exact = scored(replace(base, cache="auto", is_reference=True), "auto")
        run(exact, progress, "auto, to compare with")
        if scores:
            case = {key: case[key] for key in ("model", "dtype", "block_size", "texts")}
            for codec in codecs.split(","):
                plan = scored(replace(base, folder=str(Path(folder, codec)), codec=codec), codec)
                run(saving(plan), progress, f"{codec}, saving")
                run(plan, progress, f"{codec}, loading")
                accuracy_record.append("store_scores", case, codec, kl(plan), out)
            return
        timed = replace(base, lengths=sizes, long_text=long_text)
        without = run(timed, progress, NO_STORE)
        accuracy_record.append("store", case, NO_STORE, {"ttft_s": without["ttft_s"]}, out)
        for served in dict.fromkeys(c.partition("+")[0] for c in codecs.split(",") if c.startswith(("exact", "k"))):
            cache = KV_CACHE_DTYPE if served == "exact" else f"{KV_CACHE_DTYPE}:format={served}"
            plan = scored(replace(base, cache=cache), f"served-{served}")
            run(plan, progress, f"served from {cache}")
            accuracy_record.append("store", case, f"served {cache}", {"scores": kl(plan)}, out)
        for codec in codecs.split(","):
            root = Path(folder, codec)
            plan = scored(replace(timed, folder=str(root), codec=codec), codec)
            cold = run(saving(plan), progress, f"{codec}, saving")
            blocks = list(index.stored_files(root))
            warm = run(plan, progress, f"{codec}, loading")
            metrics = {
                "ttft_s": warm["ttft_s"],
                "ttft_saving_s": cold["ttft_s"],
                "cached": warm["cached"],
                "same_tokens": warm["token"] == cold["token"],
                "file_bytes_per_token": sum(block.num_bytes for block in blocks) / (len(blocks) * BLOCK_SIZE),
                **cold["sheet"],
                "scores": kl(plan),
            }
            accuracy_record.append("store", case, codec, metrics, out)
            ratios = [f"{a / b:.3f}" for a, b in zip(warm["ttft_s"], without["ttft_s"], strict=True)]
            divergence = metrics["scores"]["kl_per_token"]["value"]
            console.print(f"{codec}: TTFT {', '.join(ratios)} of prefill, KL {divergence:.2e}")


if __name__ == "__main__":
    typer.run(main)

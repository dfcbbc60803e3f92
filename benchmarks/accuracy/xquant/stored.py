"""The codecs of the KV store, simulated: a prefix that comes back from it, in a K8V8 cache, and what is said behind."""

import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.mha_model import make_mha_model
from benchmarks.accuracy.schemes import SCHEMES
from benchmarks.accuracy.simulator import summarize
from benchmarks.accuracy.texts import windows
from benchmarks.accuracy.xquant.inputs import Fixed, InputCodec, Prediction, Stepped, Transform
from benchmarks.accuracy.xquant.kv import BoundedCodec, SchemeCodec
from benchmarks.accuracy.xquant.latents import SteppedLatentCodec
from benchmarks.accuracy.xquant.remat import Codec, RematSimulator, Run, Tensors
from benchmarks.accuracy.xquant.rows import GROUP
from benchmarks.engines.store import CODECS, MHA, PREFIX_TOKENS, SCORED_TOKENS
from vllm_int8kv.commands.models import resolve
from vllm_int8kv.evaluation import record

SCALED = Transform(norm_exponent=0, rms_exponent=0.5)
"""What the store's factors do, which know no weights."""
FIRST = (Fixed(8, GROUP, midpoint=False),) * 3


class AsItIs(Codec):
    """Nothing is lost on the way to the store and back."""

    def start(self, model: RematSimulator) -> Run:
        return Run(model.project)


@dataclass(frozen=True)
class OfPages(Codec):
    """A codec of K and V that sees what is in the pages of the cache."""

    codec: Codec

    def start(self, model: RematSimulator) -> Run:
        return self.codec.start(Pages(model))


class Pages:
    """In the place of a model whose K and V have been in a K8V8 cache."""

    def __init__(self, model: RematSimulator) -> None:
        self._model = model

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def project(self, index: int, x: object) -> Tensors:
        return self._model.through_k8v8(index, *self._model.project(index, x))


def codec_of(name: str) -> Codec:
    """What does to K and V, or to X, what a codec of the store does.

    Raises:
        ValueError: there is no codec of that name.
    """
    base, _, step = name.removesuffix("+zstd").partition(":")
    if base in ("exact", "x"):
        return AsItIs()
    if base == "bound":
        return OfPages(BoundedCodec(Stepped(float(step))))
    if base == "xbound":
        return InputCodec(Stepped(float(step)), SCALED, Prediction.factors, steps_of_whole=True)
    if base == "xsvd":
        return SteppedLatentCodec(float(step))
    if found := re.fullmatch(r"x(cl)?(\d)", base):
        bits = int(found[2])
        codes = Fixed(bits, GROUP, midpoint=bits < 8)
        rotated = replace(SCALED, rotate=True)
        return InputCodec(codes, rotated, Prediction.factors, FIRST) if found[1] else InputCodec(codes, rotated)
    if scheme := next((scheme for scheme in SCHEMES if scheme.name == base), None):
        return OfPages(SchemeCodec(scheme))
    raise ValueError(f"there is no codec {name!r}")


def simulate_store(
    model: Annotated[str, typer.Option(help="folder of a Llama-like model, or smollm2")] = "smollm2",
    codecs: Annotated[str, typer.Option(help="comma-separated")] = CODECS,
    multi_head: Annotated[bool, typer.Option("--multi-head", help="a copy with a KV head for each query head")] = False,
    num_windows: Annotated[int, typer.Option("--windows", help="of 1,280 tokens, of each text that has them")] = 1,
    out: Annotated[Path, typer.Option(help="folder of the records")] = accuracy_record.RESULTS,
) -> None:
    """Score prefixes from the KV store without an engine; one line per codec, for the table of the store."""
    from transformers import AutoTokenizer

    record.environment()  # the commit that is measured, whatever happens to the checkout meanwhile
    chosen = {name: codec_of(name) for name in codecs.split(",")}
    path = str(resolve(model))
    chosen_texts = windows(AutoTokenizer.from_pretrained(path).encode, PREFIX_TOKENS + SCORED_TOKENS, num_windows)
    case = {"model": model + (MHA if multi_head else ""), "prefix_tokens": PREFIX_TOKENS, "texts": list(chosen_texts)}
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        if multi_head:
            path = str(make_mha_model(Path(path), Path(folder, "model")))
        simulator = RematSimulator(path, list(chosen_texts.values()))
        for name, codec in track(chosen.items(), console=console):
            score = simulator.score(codec, behind_k8v8=True, prefix_tokens=PREFIX_TOKENS)
            metrics = summarize(dict(zip(chosen_texts, score.divergences, strict=True)))
            accuracy_record.append("store_simulated", case, name, metrics, out)
            console.print(f"{name}: KL {metrics['kl_per_token']:.2e}")

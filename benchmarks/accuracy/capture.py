"""Queries, keys and values of every attention layer of a model, as vLLM computes them.

    python -m benchmarks.accuracy.capture out.pt                                SmolLM2 on the text of the demo
    python -m benchmarks.accuracy.capture out.pt --model FOLDER --text FILE --tokens 4096

vLLM runs the text as one prompt in this process, with an unquantized cache; a hook on each `Attention` layer keeps
what it is called with, that is after RoPE and before any quantization. `load` reads the file back.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_int8kv.commands import models
from vllm_int8kv.evaluation import record
from vllm_int8kv.evaluation.demo import TEXT


@dataclass(frozen=True)
class Captured:
    """What one attention layer saw of one prompt, in the dtype of the model."""

    query: torch.Tensor
    """[num_tokens, num_heads, head_size]"""
    key: torch.Tensor
    """[num_tokens, num_kv_heads, head_size]"""
    value: torch.Tensor
    """[num_tokens, num_kv_heads, head_size]"""
    softmax_scale: float


def load(path: Path) -> dict[str, Captured]:
    """Read a capture: the layers by vLLM's names, in the order of the model."""
    return {name: Captured(**layer) for name, layer in torch.load(path, weights_only=True).items()}


def capture(model: str = "", text: Path = TEXT, num_tokens: int = 0, dtype: str = "auto") -> dict[str, Captured]:
    """`load` of a capture that a process of its own makes, so that no engine stays behind in this one.

    Raises:
        RuntimeError: the engine failed; the message ends with the last lines of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "capture.pt"
        command = [sys.executable, "-m", "benchmarks.accuracy.capture", str(out), "--text", str(text)]
        command += ["--model", model, "--tokens", str(num_tokens), "--dtype", dtype]
        done = subprocess.run(
            command, cwd=record.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            log = "\n".join(done.stdout.splitlines()[-30:])
            raise RuntimeError(f"the capture of {model or 'SmolLM2'} exited with {done.returncode}:\n{log}")
        return load(out)


def main(
    out: Annotated[Path, typer.Argument(help="file to write")],
    model: Annotated[str, typer.Option(help="folder of a model; default: the embedded SmolLM2")] = "",
    text: Annotated[Path, typer.Option(help="text file, the prompt")] = TEXT,
    tokens: Annotated[int, typer.Option(help="how many of its tokens; default: all that the model takes")] = 0,
    dtype: Annotated[str, typer.Option(help="of the model, as vLLM takes it")] = "auto",
) -> None:
    """Run a prompt and write what the attention layers saw."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the hooks are functions of this process
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers.attention import Attention

    llm = LLM(
        model or str(models.smollm2()),
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 30,
    )
    limit = llm.llm_engine.model_config.max_model_len - 1  # one token is generated
    token_ids = llm.get_tokenizer().encode(text.read_text())[: min(tokens or limit, limit)]
    captured: dict[str, Captured] = {}

    def keep(layer: Attention, args: tuple, kwargs: dict) -> None:
        given = kwargs | dict(zip(("query", "key", "value"), args, strict=False))
        heads = {"query": layer.num_heads, "key": layer.num_kv_heads, "value": layer.num_kv_heads}
        # A decode step has one token; padding comes after the tokens.
        if len(given["query"]) >= len(token_ids) > 1:
            parts = {
                name: given[name][: len(token_ids)].reshape(len(token_ids), num_heads, -1).clone()
                for name, num_heads in heads.items()
            }
            captured[layer.layer_name] = Captured(**parts, softmax_scale=float(layer.impl.scale))

    def add_hooks(network: torch.nn.Module) -> int:
        layers = [module for module in network.modules() if isinstance(module, Attention)]
        for layer in layers:
            layer.register_forward_pre_hook(keep, with_kwargs=True)
        return len(layers)

    (num_layers,) = llm.apply_model(add_hooks)
    llm.generate({"prompt_token_ids": token_ids}, SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    if len(captured) != num_layers:
        sys.exit(f"{len(captured)} of {num_layers} attention layers were called with all {len(token_ids)} tokens")
    torch.save({name: asdict(layer) for name, layer in captured.items()}, out)
    print(f"{num_layers} layers, {len(token_ids)} tokens: {out}")


if __name__ == "__main__":
    typer.run(main)

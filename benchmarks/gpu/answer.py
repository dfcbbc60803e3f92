"""Asks one engine for the capital of France: `python -m benchmarks.gpu.answer --name V2-eager --enforce-eager`.

In a process of its own, as the model runner of vLLM is chosen by an environment variable. Exits with 1 if the answer is
another one.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.gpu.calls import ANSWERS
from vllm_int8kv.commands import models
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.demo import PROMPTS

QUESTION = PROMPTS[0]
"""That of the capital of France as `demo` asks it, which SmolLM2 knows with every cache and dtype."""
ANSWER = "Paris"
KV_CACHE_MEMORY_BYTES = 1 << 28


def main(
    name: Annotated[str, typer.Option(help="of the line in answers.jsonl")],
    out: Annotated[Path, typer.Option(help="folder of answers.jsonl")],
    kv_cache_dtype: Annotated[str, typer.Option(help="as vLLM takes it")] = KV_CACHE_DTYPE,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="without CUDA graphs")] = False,
    engine_args: Annotated[str, typer.Option(help="arguments of `LLM`, JSON")] = "{}",
) -> None:
    """Append the answer and how long the engine took to start and to answer, in seconds."""
    from vllm import LLM, SamplingParams

    started = time.monotonic()
    llm = LLM(
        str(models.smollm2()),
        kv_cache_dtype=kv_cache_dtype,
        enforce_eager=enforce_eager,
        max_model_len=512,
        max_num_seqs=8,
        kv_cache_memory_bytes=KV_CACHE_MEMORY_BYTES,
        **json.loads(engine_args),
    )
    has_started = time.monotonic()
    conversation = [{"role": "user", "content": QUESTION}]
    text = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=32))[0].outputs[0].text
    line = {"name": name, "kv_cache_dtype": kv_cache_dtype, "answer": text, "is_right": ANSWER in text}
    line |= {"start_s": round(has_started - started, 1), "answer_s": round(time.monotonic() - has_started, 2)}
    with (out / ANSWERS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line, flush=True)
    sys.exit(0 if line["is_right"] else 1)


if __name__ == "__main__":
    typer.run(main)

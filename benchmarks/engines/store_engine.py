"""One engine of `store.py`, run by `EngineProcess`; its one message is the fields of a `StorePlan`."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from benchmarks.engines.store import BLOCK_SIZE, StorePlan
from vllm_int8kv.cache.formats import native_content_bytes
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines.forced_decoding import OPTIONS, forced_params, kv_cache_memory_bytes, steps
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.scoring import TextFiles
from vllm_int8kv.store import files, index, transfer_config
from vllm_int8kv.store.engine.contents import Block

BF16_ITEMSIZE = 2
SHEET_BLOCKS = 16
SHEET_ROUNDS = 3
IDLE_SECONDS = 30.0
STEP_DECODES = 4
STEP_DECODE_TOKENS = 256
STEP_PERIODS = 16
STEP_PROMPT_TOKENS = 1024
STEPS_PER_PROMPT = 32
POLL_SECONDS = 1e-3


def start(plan: StorePlan) -> LLM:
    """The engine, with the store if the plan has one."""
    longest = max([*plan.lengths, plan.prefix_tokens + plan.scored_tokens]) + BLOCK_SIZE
    config = EngineArgs(model=plan.model, dtype=plan.dtype).create_model_config()
    store = transfer_config({"path": plan.folder, "codec": plan.codec}) if plan.folder else None
    spec = CacheSpec.parse(plan.cache, "cache")
    return LLM(
        plan.model,
        dtype=plan.dtype,
        max_model_len=longest,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=kv_cache_memory_bytes(config, 8 * longest),
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        kv_transfer_config=store,
        **OPTIONS,
        **spec.llm_arguments(None),
    )


def first_tokens(llm: LLM, prompts: Sequence[list[int]]) -> dict:
    """Of each prompt by itself: seconds to the first token, the token, and how many tokens were not computed."""
    found: dict[str, list] = {"ttft_s": [], "token": [], "cached": []}
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    for prompt in prompts:
        begin = time.perf_counter()
        (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        found["ttft_s"].append(time.perf_counter() - begin)
        found["token"].append(output.outputs[0].token_ids[0])
        found["cached"].append(output.num_cached_tokens)
    return found


def step_times(llm: LLM, tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds of the steps of an engine that decodes all the time, in periods that begin with a prompt.

    In every other pair of periods nothing is saved; so each period has a neighbour to be compared with, whatever else
    the machine does in those minutes. Otherwise every block that is full is saved, those of a prompt all at once.

    Returns:
        of each period whether it `saves`, the `prefill` step, which computes the prompt beside the decodes, the
        `decode` steps, and behind them the `rest`: until all is written, while nothing else is done.
    """
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group()._transfers
    texts = (tokens[begin:] for begin in range(0, len(tokens), STEP_PROMPT_TOKENS))  # none begins as another one
    engine = llm.llm_engine

    def ask(name: str, num_tokens: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": next(texts)[:num_tokens]}, params)

    def step() -> float:
        begin = time.perf_counter()
        engine.step()
        return time.perf_counter() - begin

    for number in range(STEP_DECODES):
        ask(f"decode-{number}", STEP_DECODE_TOKENS, (STEP_PERIODS + 1) * STEPS_PER_PROMPT)
    for _ in range(STEPS_PER_PROMPT):  # they compute the beginnings and warm up
        step()
    periods = []
    for number in range(STEP_PERIODS):
        saves = transfers.contents.saves = number % 4 in (0, 3)
        ask(f"prompt-{number}", STEP_PROMPT_TOKENS, 1)
        prefill, *decode = [step() for _ in range(STEPS_PER_PROMPT)]
        begin = time.perf_counter()
        while transfers.queued_bytes:
            time.sleep(POLL_SECONDS)
        rest = time.perf_counter() - begin
        periods.append({"saves": saves, "prefill": prefill, "decode": decode, "rest": rest})
    return periods


def score(llm: LLM, plan: StorePlan, vocab_size: int) -> None:
    """Score the tokens behind each text's prefix by decode steps, into the plan's files."""
    for place, token_ids in enumerate(plan.texts):
        text = TextFiles(token_ids, plan.scores[place], plan.references[place], plan.is_reference)
        text.create(vocab_size)
        begin = plan.prefix_tokens + 1  # what is read from the store are whole blocks
        prompt = {"prompt_token_ids": token_ids[:begin]}
        llm.llm_engine.add_request(f"text-{place}", prompt, forced_params(text, begin, len(token_ids)))
    for _ in steps(llm):
        pass


def wait_for_saves(folder: Path) -> None:
    """Until nothing is added to the folder any more."""
    deadline, before = time.monotonic() + IDLE_SECONDS, -1
    while time.monotonic() < deadline:
        now = sum(1 for _ in folder.rglob(f"*{files.SUFFIX}"))
        if now == before:
            return
        before = now
        time.sleep(1.0)


def sheet(llm: LLM, folder: Path) -> dict[str, float]:
    """Bytes and speed of the codec on blocks that were saved, on one thread; speeds in bytes of the cache."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    contents = get_kv_transfer_group()._transfers.contents
    paths = [file.path for file in index.stored_files(folder)][:SHEET_BLOCKS]
    payloads = [files.read(path)[1] for path in paths]
    blocks = [Block(path.stem, place + 1, place) for place, path in enumerate(paths)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"encode": [], "decode": [], "put": []}

    def timed(what: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        seconds[what].append(time.perf_counter() - begin)
        return result

    for _ in range(SHEET_ROUNDS):
        parts = timed("decode", lambda: contents.codec.decode(payloads))
        timed("put", lambda parts=parts: contents.put(blocks, parts))
        timed("encode", lambda parts=parts: contents.codec.encode(parts))
    torch.set_num_threads(threads)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    num_bytes = len(blocks) * contents.page_bytes
    return {
        "bytes_per_token": sum(map(len, payloads)) / (len(blocks) * BLOCK_SIZE),
        "page_bytes_per_token": contents.page_bytes / BLOCK_SIZE,
        "bf16_bytes_per_token": sum(
            layer.num_kv_heads * native_content_bytes(layer.head_size, BF16_ITEMSIZE) for layer in layers
        ),
        **{f"{what}_gb_per_s": num_bytes / min(found) / 1e9 for what, found in seconds.items()},
    }


def main() -> None:
    plan = StorePlan(**json.loads(sys.stdin.readline()))
    emit(stage="load", done=0.0)
    llm = start(plan)
    emit(stage="load", done=1.0)
    result: dict = {}
    if plan.lengths:
        tokens = llm.get_tokenizer().encode(plan.long_text)
        # Each from another place, or the prefix cache would know the beginning.
        prompts = [tokens[1000 * place : 1000 * place + length] for place, length in enumerate(plan.lengths)]
        result = first_tokens(llm, prompts)
    if plan.times_steps:
        result["steps"] = step_times(llm, llm.get_tokenizer().encode(plan.long_text))
    if plan.texts:
        score(llm, plan, llm.llm_engine.vllm_config.model_config.get_vocab_size())
    if plan.folder:
        wait_for_saves(Path(plan.folder))
        if plan.is_cold:
            result["sheet"] = sheet(llm, Path(plan.folder))
    emit(stage="run", done=1.0)
    finish(llm, result)


if __name__ == "__main__":
    main()

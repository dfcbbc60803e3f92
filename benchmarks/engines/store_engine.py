"""One engine of `store.py`, run by `EngineProcess`; its one message is the fields of a `StorePlan`."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from benchmarks.engines.store import BLOCK_SIZE, StorePlan
from vllm_int8kv.cache.formats import native_content_bytes
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines.forced_decoding import OPTIONS, forced_params, kv_cache_memory_bytes, steps
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.scoring import TextFiles
from vllm_int8kv.store import files
from vllm_int8kv.store.pages import copy_out

BF16_ITEMSIZE = 2
SHEET_BLOCKS = 16
SHEET_ROUNDS = 3
IDLE_SECONDS = 30.0


def start(plan: StorePlan) -> LLM:
    """The engine, with the store if the plan has one."""
    longest = max([*plan.lengths, plan.prefix_tokens + plan.scored_tokens]) + BLOCK_SIZE
    config = EngineArgs(model=plan.model, dtype=plan.dtype).create_model_config()
    store = None
    if plan.folder:
        store = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "vllm_int8kv.store",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"path": plan.folder, "codec": plan.codec},
        }
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


def score(llm: LLM, plan: StorePlan, vocab_size: int) -> None:
    """Score the tokens behind each text's prefix by decode steps, into the plan's files."""
    for index, token_ids in enumerate(plan.texts):
        text = TextFiles(token_ids, plan.scores[index], plan.references[index], plan.is_reference)
        text.create(vocab_size)
        begin = plan.prefix_tokens + 1  # what is read from the store are whole blocks
        prompt = {"prompt_token_ids": token_ids[:begin]}
        llm.llm_engine.add_request(f"text-{index}", prompt, forced_params(text, begin, len(token_ids)))
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


def sheet(llm: LLM) -> dict[str, float]:
    """Bytes and speed of the codec on pages of the cache, on one thread."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group()._transfers
    layers, codec = transfers.layers, transfers._codec
    pages = copy_out(layers, list(range(1, SHEET_BLOCKS + 1)))
    page_bytes = SHEET_BLOCKS * sum(layer.page_bytes for layer in layers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode, decode = [], []
    for _ in range(SHEET_ROUNDS):
        begin = time.perf_counter()
        payloads = codec.encode(pages)
        encode.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        codec.decode(payloads)
        decode.append(time.perf_counter() - begin)
    torch.set_num_threads(threads)
    tokens = SHEET_BLOCKS * BLOCK_SIZE
    return {
        "bytes_per_token": sum(map(len, payloads)) / tokens,
        "bf16_bytes_per_token": sum(
            layer.num_kv_heads * native_content_bytes(layer.head_size, BF16_ITEMSIZE) for layer in layers
        ),
        "encode_gb_per_s": page_bytes / min(encode) / 1e9,
        "decode_gb_per_s": page_bytes / min(decode) / 1e9,
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
    if plan.texts:
        score(llm, plan, llm.llm_engine.vllm_config.model_config.get_vocab_size())
    if plan.folder:
        wait_for_saves(Path(plan.folder))
        if plan.is_cold:
            result["sheet"] = sheet(llm)
    emit(stage="run", done=1.0)
    finish(llm, result)


if __name__ == "__main__":
    main()

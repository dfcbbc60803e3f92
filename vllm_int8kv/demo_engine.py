"""One engine of the demo, in a process of its own: `python -m vllm_int8kv.demo_engine PLAN`.

PLAN is a `demo.Plan` as JSON. Lines on stdout that start with `demo.EVENT` go on with one JSON object for the
parent; every other line is the log of vLLM. vLLM's workers import the module too and find `ForcedDecoding` here.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from vllm_int8kv.demo import EVENT, Plan

MAX_NUM_BATCHED_TOKENS = 2048
WARM_UP_STEPS = 2
MARGIN_TOKENS = 256


class ForcedDecoding(AdapterLogitsProcessor):
    """Makes a request say a given text and records what the model would rather have said.

    For requests with `extra_args["forced_text"]`: `token_ids`, the text; `path`, a .npy file
    [num_tokens, vocab_size] fp32 of log-probabilities; `first_row`, the row of the first token.
    """

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Callable | None:
        forced = (params.extra_args or {}).get("forced_text")
        if forced is None:
            return None
        log_probs = np.load(forced["path"], mmap_mode="r+")

        def record_and_force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            step = len(output_ids)
            log_probs[forced["first_row"] + step] = torch.log_softmax(logits.float(), dim=-1).cpu().numpy()
            forced_logits = torch.full_like(logits, -torch.inf)
            forced_logits[forced["token_ids"][step]] = 0.0
            return forced_logits

        return record_and_force


def emit(**event: object) -> None:
    """Send one event to the parent."""
    print(EVENT + json.dumps(event), flush=True)


def main() -> None:
    plan = Plan(**json.loads(sys.argv[1]))
    emit(stage="load", done=0.0)
    model_config = EngineArgs(model=plan.model, dtype=plan.dtype).create_model_config()
    # Beside the context: the tokens of the speed test and what prefill steps let the first sequences run ahead.
    max_model_len = min(plan.context_len + MARGIN_TOKENS, model_config.max_model_len)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,
        kv_cache_dtype=plan.kv_cache_dtype,
        kv_cache_memory_bytes=kv_cache_memory_bytes(model_config, plan.num_seqs * max_model_len),
        max_model_len=max_model_len,
        max_num_seqs=max(plan.num_seqs, len(plan.prompts)),
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        # Compiling takes about a minute on two cores, more than it saves here.
        enforce_eager=True,
        logits_processors=["vllm_int8kv.demo_engine:ForcedDecoding"],
        disable_log_stats=True,
    )
    emit(stage="load", done=1.0)
    cache_config = llm.llm_engine.vllm_config.cache_config
    result = {
        "kv_cache_tokens": cache_config.num_gpu_blocks * cache_config.block_size,
        "kv_cache_memory_bytes": cache_config.kv_cache_memory_bytes,
        "num_seqs": plan.num_seqs,
        "context_len": max_model_len - MARGIN_TOKENS,
        "num_threads": torch.get_num_threads(),
    }
    if plan.prompts:
        result["answers"] = answer(llm, plan)
    if plan.text:
        score_text(llm, plan, model_config.get_vocab_size())
    if plan.decode_steps:
        result["decode_tok_per_s"] = measure_decode(llm, plan, result["context_len"], model_config.get_vocab_size())
    emit(result=result)


def kv_cache_memory_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Memory in which `num_tokens` fit with `kv_cache_dtype="auto"`; both dtypes get the same."""
    heads = config.get_total_num_kv_heads() * config.get_total_num_hidden_layers()
    return 2 * heads * config.get_head_size() * config.dtype.itemsize * num_tokens


def steps(llm: LLM) -> Iterator[list[RequestOutput]]:
    """Run the engine until no request is left; yields the outputs of each step."""
    while llm.llm_engine.has_unfinished_requests():
        yield llm.llm_engine.step()


def answer(llm: LLM, plan: Plan) -> list[str]:
    """Greedy answers to the prompts, by the model's chat template."""
    chats = [[{"role": "user", "content": prompt}] for prompt in plan.prompts]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=plan.answer_tokens), use_tqdm=False)
    emit(stage="answer", done=1.0)
    return [output.outputs[0].text.strip() for output in outputs]


def score_text(llm: LLM, plan: Plan, vocab_size: int) -> None:
    """Record the log-probabilities of every token of the text given all tokens before it.

    The text is cut into `num_seqs` parts that are decoded side by side, each after the text before it, so that
    every row but the first of a part comes from a decode step that reads the whole context from the cache.
    """
    token_ids = llm.get_tokenizer().encode(plan.text)[: llm.llm_engine.vllm_config.model_config.max_model_len]
    num_rows = len(token_ids) - 1
    np.lib.format.open_memmap(plan.log_probs_path, "w+", np.float32, (num_rows, vocab_size)).flush()
    bounds = [1 + num_rows * part // plan.num_seqs for part in range(plan.num_seqs + 1)]
    for begin, end in pairwise(bounds):
        forced = {"path": plan.log_probs_path, "first_row": begin - 1, "token_ids": token_ids[begin:end]}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=end - begin,
            ignore_eos=True,
            detokenize=False,
            extra_args={"forced_text": forced},
        )
        llm.llm_engine.add_request(f"text-{begin}", {"prompt_token_ids": token_ids[:begin]}, params)
    num_done = {}
    for outputs in steps(llm):
        num_done |= {output.request_id: len(output.outputs[0].token_ids) for output in outputs}
        emit(stage="text", done=sum(num_done.values()) / num_rows)


def measure_decode(llm: LLM, plan: Plan, context_len: int, vocab_size: int) -> float:
    """Output tokens per second of `num_seqs` sequences with `context_len` different random tokens each.

    Only steps in which every sequence decodes are timed; the median of their durations counts.
    """
    rng = np.random.default_rng(seed=0)
    prefill_steps = -(-plan.num_seqs * context_len // MAX_NUM_BATCHED_TOKENS)
    max_tokens = prefill_steps + plan.num_seqs + WARM_UP_STEPS + plan.decode_steps  # the first runs ahead
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    request_ids = [f"decode-{seq}" for seq in range(plan.num_seqs)]
    for request_id in request_ids:
        prompt = rng.integers(vocab_size // 100, vocab_size, context_len).tolist()
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    decoding, durations = set(), []
    total_steps = WARM_UP_STEPS + plan.decode_steps
    start = time.perf_counter()
    for outputs in steps(llm):
        all_decoding = len(decoding) == len(request_ids)
        decoding |= {output.request_id for output in outputs}
        now = time.perf_counter()
        if all_decoding:
            durations.append(now - start)
        start = now
        emit(stage="decode", done=0.8 * len(decoding) / len(request_ids) + 0.2 * len(durations) / total_steps)
        if len(durations) == total_steps:
            break
    llm.llm_engine.abort_request(request_ids)
    return plan.num_seqs / statistics.median(durations[WARM_UP_STEPS:])


if __name__ == "__main__":
    main()

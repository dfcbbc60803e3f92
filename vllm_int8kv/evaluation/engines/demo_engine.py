"""One engine of the demo, run by `process`; its plan is a `demo.DemoPlan`."""

import json
import statistics
import sys
import time

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.demo import DemoPlan
from vllm_int8kv.evaluation.engines.forced_decoding import OPTIONS, kv_cache_memory_bytes, score_decode, steps
from vllm_int8kv.evaluation.engines.process import emit, finish
from vllm_int8kv.evaluation.scoring import TextFiles

MAX_NUM_BATCHED_TOKENS = 2048
WARM_UP_STEPS = 2
MARGIN_TOKENS = 256
PROBE_TOKENS = 1024


def main() -> None:
    plan = DemoPlan(**json.load(sys.stdin))
    emit(stage="load", done=0.0)
    model_config = EngineArgs(model=plan.model, dtype=plan.dtype).create_model_config()
    # Beside the context: the tokens of the speed test and what prefill steps let the first sequences run ahead.
    max_model_len = min(plan.context_len + MARGIN_TOKENS, model_config.max_model_len)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,
        kv_cache_memory_bytes=kv_cache_memory_bytes(model_config, plan.num_seqs * max_model_len),
        max_model_len=max_model_len,
        max_num_seqs=max(plan.num_seqs, len(plan.prompts)),
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        # Compiling takes about a minute on two cores, more than it saves here.
        enforce_eager=True,
        disable_log_stats=True,
        **OPTIONS,
        **CacheSpec.parse(plan.kv_cache_dtype, "kv_cache_dtype").llm_arguments(),
    )
    emit(stage="load", done=1.0)
    cache_config = llm.llm_engine.vllm_config.cache_config
    result = {
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "kv_cache_tokens": cache_config.num_gpu_blocks * cache_config.block_size,
        "kv_cache_memory_bytes": cache_config.kv_cache_memory_bytes,
        "num_seqs": plan.num_seqs,
        "num_threads": torch.get_num_threads(),
    }
    if plan.prompts:
        result["answers"] = answer(llm, plan)
    if plan.text:
        result["text_tokens"] = score_text(llm, plan, model_config.get_vocab_size())
    if plan.decode_steps:
        vocab_size = model_config.get_vocab_size()
        result["context_len"] = plan.decode_context_len or choose_context(
            llm, plan, max_model_len - MARGIN_TOKENS, vocab_size
        )
        result["decode_tok_per_s"] = measure_decode(llm, plan, result["context_len"], vocab_size)
    finish(llm, result)


def answer(llm: LLM, plan: DemoPlan) -> list[str]:
    """Greedy answers to the prompts, by the model's chat template."""
    chats = [[{"role": "user", "content": prompt}] for prompt in plan.prompts]
    outputs = llm.chat(chats, SamplingParams(temperature=0.0, max_tokens=plan.answer_tokens), use_tqdm=False)
    emit(stage="answer", done=1.0)
    return [output.outputs[0].text.strip() for output in outputs]


def score_text(llm: LLM, plan: DemoPlan, vocab_size: int) -> int:
    """Score the text by decode steps; returns the number of scored tokens."""
    max_model_len = llm.llm_engine.vllm_config.model_config.max_model_len
    token_ids = llm.get_tokenizer().encode(plan.text)[:max_model_len]
    files = TextFiles(token_ids, plan.scores_path, plan.reference_path, plan.is_reference)
    files.create(vocab_size)
    score_decode(llm, [files], plan.num_seqs, lambda done: emit(stage="text", done=done))
    return files.num_rows


def choose_context(llm: LLM, plan: DemoPlan, longest: int, vocab_size: int) -> int:
    """The context whose prefill takes `plan.prefill_seconds` for all sequences, by the time one prompt takes; a
    multiple of PROBE_TOKENS // 4 or `longest`."""
    if longest <= PROBE_TOKENS:
        return longest
    prompt = np.random.default_rng(seed=1).integers(vocab_size // 100, vocab_size, PROBE_TOKENS).tolist()
    start = time.perf_counter()
    llm.generate({"prompt_token_ids": prompt}, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    num_tokens = plan.prefill_seconds * PROBE_TOKENS / (time.perf_counter() - start) / plan.num_seqs
    unit = PROBE_TOKENS // 4
    return min(longest, max(unit, int(num_tokens) // unit * unit))


def measure_decode(llm: LLM, plan: DemoPlan, context_len: int, vocab_size: int) -> float:
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

"""One engine of `vllm-int8kv eval`, run by `process`; its plan is an `eval_plan.EvalPlan`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import vllm
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm_int8kv.evaluation.engines.forced_decoding import (
    OPTIONS,
    kv_cache_memory_bytes,
    score_decode,
    score_prefill,
    score_prefix_reads,
)
from vllm_int8kv.evaluation.engines.process import emit, finish, refuse
from vllm_int8kv.evaluation.eval_plan import NEEDLE_ROOM, EvalPlan, scores_path
from vllm_int8kv.evaluation.scoring import TextFiles

NUM_ANSWERS = 8
PROMPT_TOKENS = 64
"""Of a greedy answer; cut out of the texts."""
NEEDLE_DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.95)
CITIES = ("Oslo", "Lima", "Cairo", "Quito", "Hanoi")
NEEDLE = "\n\nThe secret number of {city} is {number}. Do not forget it.\n\n"
QUESTION = "\n\nThe secret number of {city} is"
MAX_CACHE_TOKENS = 1 << 16


def main() -> None:
    plan = EvalPlan(**json.load(sys.stdin))
    emit(stage="load", done=0.0)
    llm = start(plan)
    emit(stage="load", done=1.0)
    config = llm.llm_engine.vllm_config
    token_ids = plan.token_ids or write_texts(llm, plan)
    plan = replace(plan, token_ids=token_ids)
    result = {
        "token_ids": token_ids,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": current_platform.get_device_name(),
        "vllm": vllm.__version__,
        "block_size": config.cache_config.block_size,
        "kv_cache_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
    }
    for path in plan.paths:
        texts = text_files(plan, token_ids, path, config.model_config.get_vocab_size())

        def on_progress(done: float, path: str = path) -> None:
            emit(stage=path, done=done)

        if path == "decode":
            score_decode(llm, texts, plan.num_parts, on_progress)
        elif path == "prefix":
            result["prefix_hit_share"] = score_prefix_reads(llm, texts, plan.strides(path), on_progress)
        else:
            score_prefill(llm, texts, on_progress, plan.chunks() if path == "chunked" else None)
    if plan.generate_tokens:
        result["answers"] = answer(llm, token_ids, plan.generate_tokens)
        emit(stage="generate", done=1.0)
    if plan.needle_lengths:
        result["needle"] = find_needles(llm, token_ids, plan.needle_lengths)
    finish(llm, result)


def start(plan: EvalPlan) -> LLM:
    """The engine, with as much memory for its cache as `auto` needs for everything at once, within reason."""
    dtype = "float32" if plan.dtype == "auto" and current_platform.is_cpu() else plan.dtype
    model_config = EngineArgs(model=plan.model, dtype=dtype).create_model_config()
    longest = max(plan.max_tokens + 1, PROMPT_TOKENS + plan.generate_tokens, *(plan.needle_lengths or [0]))
    max_model_len = min(longest, model_config.max_model_len)
    num_seqs = plan.num_parts * max(len(plan.token_ids), len(plan.texts), plan.num_samples)
    options = {
        "kv_cache_memory_bytes": kv_cache_memory_bytes(model_config, min(num_seqs * max_model_len, MAX_CACHE_TOKENS)),
        "max_model_len": max_model_len,
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": max(2048, max_model_len),  # whole texts in one step
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        # Compiling takes about a minute on two cores, more than it saves here.
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    return LLM(plan.model, dtype=dtype, **(options | OPTIONS | plan.cache.llm_arguments()))


def text_files(plan: EvalPlan, token_ids: Sequence[list[int]], path: str, vocab_size: int) -> list[TextFiles]:
    """Empty score files of all texts on one path. The reference is what the reference engine decodes."""
    texts = []
    for index, ids in enumerate(token_ids):
        reference = scores_path(plan, "reference", "decode", index)
        is_reference = plan.is_reference and path == "decode"
        files = TextFiles(ids, scores_path(plan, plan.label, path, index), reference, is_reference)
        files.create(vocab_size)
        texts.append(files)
    return texts


def write_texts(llm: LLM, plan: EvalPlan) -> list[list[int]]:
    """Tokenize the texts, or have the model write some. Ends the engine if one is too short to be scored."""
    limit = min(plan.max_tokens, llm.llm_engine.vllm_config.model_config.max_model_len - 1)
    tokenizer = llm.get_tokenizer()
    if plan.texts:
        token_ids = [tokenizer.encode(text)[:limit] for text in plan.texts]
        if problem := plan.text_problem(token_ids):
            refuse(problem)
        return token_ids
    first = next(token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if token is not None)
    params = [
        SamplingParams(temperature=1.0, seed=seed, min_tokens=limit - 1, max_tokens=limit - 1, detokenize=False)
        for seed in range(plan.num_samples)
    ]
    outputs = llm.generate([{"prompt_token_ids": [first]}] * plan.num_samples, params, use_tqdm=False)
    emit(stage="sample", done=1.0)
    return [[first, *output.outputs[0].token_ids] for output in outputs]


def answer(llm: LLM, token_ids: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations of pieces of the texts, no piece twice."""
    everything = [token for ids in token_ids for token in ids]
    starts = np.unique(np.linspace(0, max(0, len(everything) - PROMPT_TOKENS), NUM_ANSWERS).astype(int))
    prompts = [{"prompt_token_ids": everything[start : start + PROMPT_TOKENS]} for start in starts]
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def find_needles(llm: LLM, token_ids: Sequence[list[int]], lengths: Sequence[int]) -> list[dict]:
    """Hide numbers in text and ask for them.

    Returns:
        Per length and depth: `length`, tokens of the prompt; `depth`, where the needle lies, from 0 (start) to 1;
        `found`, the share of numbers that greedy decoding says.
    """
    tokenizer, filler = llm.get_tokenizer(), [token for ids in token_ids for token in ids]
    max_model_len = llm.llm_engine.vllm_config.model_config.max_model_len
    rng, cells = np.random.default_rng(seed=0), []
    for length in lengths:
        if length > max_model_len:
            continue
        hay = (filler * -(-length // len(filler)))[: length - NEEDLE_ROOM]
        for depth in NEEDLE_DEPTHS:
            prompts, numbers = [], []
            for city in CITIES:
                numbers.append(str(rng.integers(10000, 100000)))
                where = int(depth * len(hay))
                needle = tokenizer.encode(NEEDLE.format(city=city, number=numbers[-1]), add_special_tokens=False)
                question = tokenizer.encode(QUESTION.format(city=city), add_special_tokens=False)
                prompts.append({"prompt_token_ids": [*hay[:where], *needle, *hay[where:], *question]})
            outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
            found = [o.outputs[0].text.strip().startswith(number) for o, number in zip(outputs, numbers, strict=True)]
            cells.append({"length": length, "depth": depth, "found": sum(found) / len(found)})
            emit(stage="needle", done=len(cells) / (len(lengths) * len(NEEDLE_DEPTHS)))
    return cells


if __name__ == "__main__":
    main()

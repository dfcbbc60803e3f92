"""One engine of `end_to_end.py`, in a process of its own: `python -m benchmarks.engine PLAN_JSON ANSWER_FILE`."""

import ast
import collections
import inspect
import json
import pydoc
import sys
import tarfile
import time
import typing
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from benchmarks.end_to_end import Plan

WARMUP_STEPS = 3
SPARE_TOKENS = 512
"""Room for what a sequence decodes while the others are still in prefill, and for the timed steps."""

TEXTS = (ast, collections, inspect, pydoc, tarfile, typing)


def prompts(llm: LLM, plan: Plan) -> list[list[int]]:
    """Different token ids of real text, sources of Python's standard library, for every sequence."""
    text = "\n".join(inspect.getsource(module) for module in TEXTS)
    tokens = llm.get_tokenizer().encode(text)
    starts = [seq * len(tokens) // plan.num_seqs for seq in range(plan.num_seqs)]
    return [(tokens[start:] + tokens[:start])[: plan.seq_len] for start in starts]


def bf16_cache_bytes(config: ModelConfig, num_tokens: int) -> int:
    """Memory in which `num_tokens` fit with a bf16 cache; every format gets the same."""
    heads = config.get_total_num_kv_heads() * config.get_total_num_hidden_layers()
    return 4 * heads * config.get_head_size() * num_tokens


def decode(llm: LLM, plan: Plan) -> tuple[list[float], list[int]]:
    """Times of the steps in which every sequence decodes one token, in us, and the first token of each sequence."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=SPARE_TOKENS, ignore_eos=True, detokenize=False)
    for seq, prompt in enumerate(prompts(llm, plan)):
        engine.add_request(str(seq), {"prompt_token_ids": prompt}, params)
    first_tokens: dict[int, int] = {}
    times_us: list[float] = []
    before = time.perf_counter()
    while len(times_us) < WARMUP_STEPS + plan.steps:
        all_decode = len(first_tokens) == plan.num_seqs
        outputs = engine.step()
        now = time.perf_counter()
        if any(output.finished for output in outputs):
            raise RuntimeError(f"a sequence reached {SPARE_TOKENS} tokens before {plan.steps} steps were timed")
        if all_decode and len(outputs) == plan.num_seqs:
            times_us.append((now - before) * 1e6)
        before = now
        for output in outputs:
            first_tokens.setdefault(int(output.request_id), output.outputs[0].token_ids[0])
    engine.abort_request([str(seq) for seq in range(plan.num_seqs)])
    return times_us[WARMUP_STEPS:], [first_tokens[seq] for seq in range(plan.num_seqs)]


def main() -> None:
    plan, answer = Plan(**json.loads(sys.argv[1])), Path(sys.argv[2])
    config = EngineArgs(model=plan.model).create_model_config()
    room = plan.seq_len + SPARE_TOKENS
    llm = LLM(
        plan.model,
        kv_cache_dtype=plan.kv_cache_dtype,
        # Blocks are as large as the layout asks, so each sequence may leave most of one empty.
        kv_cache_memory_bytes=bf16_cache_bytes(config, (plan.num_seqs + 1) * (room + 256)),
        max_model_len=room,
        max_num_seqs=plan.num_seqs,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    times_us, first_tokens = decode(llm, plan)
    answer.write_text(json.dumps({"times_us": times_us, "first_tokens": first_tokens}))


if __name__ == "__main__":
    main()

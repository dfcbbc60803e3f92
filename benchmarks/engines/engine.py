"""One engine of `end_to_end.py`, in a process of its own.

python -m benchmarks.engines.engine PLAN_JSON ANSWER_FILE
"""

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

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs

from benchmarks.engines.end_to_end import EnginePlan, Workload
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.engines import worker_extension
from vllm_int8kv.evaluation.engines.forced_decoding import kv_cache_memory_bytes

WARMUP_STEPS = 3
SPARE_TOKENS = 512
"""Room for what a sequence decodes while the others are still in prefill, and for the timed steps."""

TEXTS = (ast, collections, inspect, pydoc, tarfile, typing)


def prompts(llm: LLM, plan: EnginePlan, workload: Workload) -> list[list[int]]:
    """Different token ids for every sequence: of real text, sources of Python's standard library, or random ones."""
    if plan.has_random_weights:
        vocab = llm.llm_engine.model_config.get_vocab_size()
        generator = torch.Generator().manual_seed(workload.num_seqs * workload.seq_len)
        return torch.randint(vocab, (workload.num_seqs, workload.seq_len), generator=generator).tolist()
    text = "\n".join(inspect.getsource(module) for module in TEXTS)
    tokens = llm.get_tokenizer().encode(text)
    starts = [seq * len(tokens) // workload.num_seqs for seq in range(workload.num_seqs)]
    return [(tokens[start:] + tokens[:start])[: workload.seq_len] for start in starts]


def decode(llm: LLM, plan: EnginePlan, workload: Workload) -> dict:
    """Times in us of the steps in which every sequence decodes one token, each sequence's first token, and how long
    it took until all had it."""
    engine = llm.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=SPARE_TOKENS, ignore_eos=True, detokenize=False)
    names = [f"{workload.num_seqs}x{workload.seq_len} {seq}" for seq in range(workload.num_seqs)]
    for name, prompt in zip(names, prompts(llm, plan, workload), strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    first_tokens: dict[str, int] = {}
    times_us: list[float] = []
    started = before = time.perf_counter()
    prefill_s = None
    while len(times_us) < WARMUP_STEPS + plan.steps:
        outputs = engine.step()
        now = time.perf_counter()
        if any(output.finished for output in outputs):
            raise RuntimeError(f"a sequence reached {SPARE_TOKENS} tokens before {plan.steps} steps were timed")
        if prefill_s is not None and len(outputs) == workload.num_seqs:
            times_us.append((now - before) * 1e6)
        before = now
        for output in outputs:
            first_tokens.setdefault(output.request_id, output.outputs[0].token_ids[0])
        if prefill_s is None and len(first_tokens) == workload.num_seqs:
            prefill_s = now - started
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "times_us": times_us[WARMUP_STEPS:],
        "first_tokens": [first_tokens[name] for name in names],
        "prefill_s": prefill_s,
    }


def main() -> None:
    fields, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    plan = EnginePlan(**fields | {"workloads": [Workload(**sizes) for sizes in fields["workloads"]]})
    config = EngineArgs(model=plan.model, dtype=plan.dtype).create_model_config()
    room = max(workload.seq_len for workload in plan.workloads) + SPARE_TOKENS
    # Blocks are as large as the layout asks, so each sequence may leave most of one empty.
    tokens = max((workload.num_seqs + 1) * (workload.seq_len + SPARE_TOKENS + 256) for workload in plan.workloads)
    llm = LLM(
        plan.model,
        dtype=plan.dtype,
        **CacheSpec.parse(plan.cache, "--impls").llm_arguments(),
        kv_cache_memory_bytes=kv_cache_memory_bytes(config, tokens),
        max_model_len=room,
        max_num_seqs=max(workload.num_seqs for workload in plan.workloads),
        enable_prefix_caching=False,
        disable_log_stats=True,
        skip_tokenizer_init=plan.has_random_weights,
        worker_extension_cls=worker_extension.CLASS,
        **plan.engine_args,
    )
    backends = worker_extension.attention_backends(llm)
    answers = [decode(llm, plan, workload) for workload in plan.workloads]
    answer.write_text(json.dumps({"backends": backends, "answers": answers}))


if __name__ == "__main__":
    main()

"""vLLM engines with the INT8 KV cache, compared with vLLM's own cache and with themselves.

Rules of comparison:
* Real model against `auto`: greedy tokens are equal, or part where `auto` itself was undecided: its best and
  the other token lay less than `NEAR_TIE` nats apart.
* Random models against `auto`: KL divergence per prompt token at most `MAX_KL`. A window that is off by
  one or a forgotten softcap costs more than that, see `test_comparison_notices_a_wrong_window`.
* Against ourselves with other chunks, prefix hits or preemption: equal tokens. In fp32, because vLLM's bf16 matrix
  multiplications round differently for batches of different shape; our attention does not.

Engines run inside the test process, where starting one takes seconds, unless processes are the subject.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch

from vllm_int8kv import backend, cache_layout, startup_log

pytestmark = pytest.mark.engine

NEAR_TIE = 0.1
MAX_KL = 4e-3
KV_CACHE_MEMORY = 48 << 20
PROMPT_LENS = (5, 33, 70, 120)

PRICE_LIST = " ".join(f"Item {i} costs {i * 7 % 50} coins." for i in range(24))
QUESTIONS = [
    "What is the capital of France?",
    "How many days does a week have?",
    "Name three colors of the rainbow.",
    PRICE_LIST + " What does item 3 cost?",
]


@contextlib.contextmanager
def engine(model: Path, *, own_process: bool = False, **options) -> Iterator["LLM"]:  # noqa: F821
    """An engine that is gone afterwards; options are those of `LLM`."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    defaults = dict(kv_cache_dtype="int8_custom", enforce_eager=True, max_num_seqs=8, max_model_len=640)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if own_process else "0")
        # A worker pins its process to cores and replaces this function; the other tests need both as they were.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)
        llm = LLM(str(model), kv_cache_memory_bytes=KV_CACHE_MEMORY, **(defaults | options))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


@dataclass
class Answer:
    tokens: list[int]
    text: str
    top_logprobs: list[dict[int, float]]
    num_cached_tokens: int
    num_prompt_tokens: int


def ask(llm: "LLM", questions: list[str] = QUESTIONS, **options) -> list[Answer]:  # noqa: F821
    """Greedy answers of a chat model, all questions in one batch."""
    from vllm import SamplingParams

    params = SamplingParams(**dict(temperature=0, max_tokens=16, logprobs=10) | options)
    outputs = llm.chat([[{"role": "user", "content": q}] for q in questions], params, use_tqdm=False)
    return [
        Answer(
            list(o.outputs[0].token_ids),
            o.outputs[0].text,
            [{token: entry.logprob for token, entry in step.items()} for step in o.outputs[0].logprobs],
            o.num_cached_tokens,
            len(o.prompt_token_ids),
        )
        for o in outputs
    ]


def prompt_logprobs(llm: "LLM") -> torch.Tensor:  # noqa: F821
    """[tokens, vocabulary] of random prompts in one batch, a decode step included."""
    from vllm import SamplingParams

    torch.manual_seed(1)
    tokens = [torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist() for n in PROMPT_LENS]
    params = SamplingParams(
        temperature=0, max_tokens=2, prompt_logprobs=-1, logprobs=-1, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": t} for t in tokens], params, use_tqdm=False)
    rows = [
        [position[token].logprob for token in range(tiny_models.VOCAB_SIZE)]
        for output in outputs
        for position in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs[:1])
    ]
    return torch.tensor(rows)


def kl_per_token(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return (expected.exp() * (expected - actual)).sum(dim=-1).mean().item()


def tiny_engine(model: Path, **options):
    return engine(model, max_model_len=256, skip_tokenizer_init=True, max_logprobs=-1, dtype="bfloat16", **options)


def layers(llm: "LLM") -> dict[int, "Attention"]:  # noqa: F821
    """The attention layers of an engine in this process, by index."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    found = get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention)
    return {extract_layer_index(name): layer for name, layer in found.items()}


def num_cache_tokens(llm: "LLM") -> int:  # noqa: F821
    cache_config = llm.llm_engine.vllm_config.cache_config
    return cache_config.num_gpu_blocks * cache_config.block_size


# The real model.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from vllm_int8kv.models import smollm2

    return smollm2()


@pytest.fixture(scope="module")
def auto_answers(smollm2: Path) -> tuple[list[Answer], int]:
    with engine(smollm2, dtype="float32", kv_cache_dtype="auto") as llm:
        return ask(llm), num_cache_tokens(llm)


@pytest.fixture(scope="module")
def int8_answers(smollm2: Path) -> tuple[list[Answer], list[Answer], int]:
    """The same questions twice: the second time the long prompt is found in the prefix cache."""
    with engine(smollm2, dtype="float32", block_size=64) as llm:
        return ask(llm), ask(llm), num_cache_tokens(llm)


def test_greedy_answers_equal_auto_up_to_near_ties(auto_answers, int8_answers):
    for expected, actual in zip(auto_answers[0], int8_answers[0], strict=True):
        for step, (token, other) in enumerate(zip(expected.tokens, actual.tokens, strict=False)):
            if token != other:
                logprobs = expected.top_logprobs[step]
                assert logprobs[token] - logprobs.get(other, -torch.inf) < NEAR_TIE, (expected.text, actual.text)
                break
    assert "Paris" in int8_answers[0][0].text


def test_same_memory_holds_more_tokens(auto_answers, int8_answers):
    # The model runs in fp32 here, where the gain over its own cache is twice that over bf16.
    assert int8_answers[2] / auto_answers[1] >= 2 * 1.9


def test_prefix_cache_hits_do_not_change_answers(int8_answers):
    first, second, _ = int8_answers
    assert first[-1].num_cached_tokens == 0
    assert second[-1].num_cached_tokens >= 64
    assert [a.tokens for a in second] == [a.tokens for a in first]


def test_chunked_prefill_without_prefix_cache_does_not_change_answers(smollm2, int8_answers):
    options = dict(dtype="float32", max_num_batched_tokens=48, max_num_seqs=4, enable_prefix_caching=False)
    with engine(smollm2, **options) as llm:
        answers = ask(llm)
    assert answers[-1].num_prompt_tokens > 4 * 48  # so it cannot have been prefilled in one step
    assert [a.tokens for a in answers] == [a.tokens for a in int8_answers[0]]


def test_preemption_does_not_change_answers(smollm2, int8_answers):
    # Three equal prompts fit beside vLLM's null block, two blocks of answer to each do not.
    num_blocks = 3 * -(-int8_answers[0][-1].num_prompt_tokens // 16) + 2
    options = dict(block_size=16, num_gpu_blocks_override=num_blocks, enable_prefix_caching=False)
    with engine(smollm2, dtype="float32", disable_log_stats=False, **options) as llm:
        alone = ask(llm, QUESTIONS[-1:], max_tokens=24, ignore_eos=True)
        together = ask(llm, 3 * QUESTIONS[-1:], max_tokens=24, ignore_eos=True)
        (preemptions,) = (m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0
    assert [a.tokens for a in together] == 3 * [alone[0].tokens]


# Tiny random models.

MODELS = [tiny_models.llama, tiny_models.multi_head, tiny_models.multi_query]
MODELS += [tiny_models.mistral, tiny_models.gemma2, tiny_models.gemma3, tiny_models.gpt_oss]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Callable[[Callable], Path]:
    """Writes each model once."""
    folders: dict[Callable, Path] = {}

    def write(model: Callable[[Path], Path]) -> Path:
        if model not in folders:
            folders[model] = model(tmp_path_factory.mktemp(model.__name__))
        return folders[model]

    return write


@pytest.fixture(scope="module")
def auto_run(model_folder) -> Callable[[Callable], tuple[torch.Tensor, int]]:
    """Log-probabilities and cache tokens with vLLM's own cache, run once per model."""
    runs: dict[Callable, tuple[torch.Tensor, int]] = {}

    def run(model: Callable[[Path], Path]) -> tuple[torch.Tensor, int]:
        if model not in runs:
            with tiny_engine(model_folder(model), kv_cache_dtype="auto") as llm:
                runs[model] = prompt_logprobs(llm), num_cache_tokens(llm)
        return runs[model]

    return run


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_random_model_is_close_to_auto(model, model_folder, auto_run):
    expected, auto_tokens = auto_run(model)
    with tiny_engine(model_folder(model)) as llm:
        for layer in layers(llm).values():
            assert layer.kv_cache.dtype == torch.int8
            _, num_kv_heads, block_size, num_bytes = layer.kv_cache.shape
            assert num_bytes == cache_layout.content_bytes(layer.head_size)
            # Blocks lie side by side without padding, sliding-window layers included.
            assert layer.kv_cache.stride(0) == num_kv_heads * block_size * num_bytes
        assert num_cache_tokens(llm) / auto_tokens >= 1.9
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_comparison_notices_a_wrong_window(model_folder, auto_run, monkeypatch):
    expected, _ = auto_run(tiny_models.mistral)
    original = backend.Int8KVImpl.forward

    def one_token_more(self, *args, **kwargs):
        window, self.sliding_window = self.sliding_window, self.sliding_window + 1
        try:
            return original(self, *args, **kwargs)
        finally:
            self.sliding_window = window

    monkeypatch.setattr(backend.Int8KVImpl, "forward", one_token_more)
    with tiny_engine(model_folder(tiny_models.mistral)) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) > 2 * MAX_KL


@pytest.mark.parametrize(
    ("model", "skip", "unquantized"),
    [(tiny_models.llama, ["0", "2"], {0, 2}), (tiny_models.gemma2, ["sliding_window"], {0, 2})],
    ids=["by_index", "sliding_window"],
)
def test_skipped_layers_keep_the_native_cache(model, skip, unquantized, model_folder, auto_run):
    expected, _ = auto_run(model)
    with tiny_engine(model_folder(model), kv_cache_dtype_skip_layers=skip) as llm:
        by_index = layers(llm)
        assert {index for index, layer in by_index.items() if layer.kv_cache.dtype == torch.bfloat16} == unquantized
        for index, layer in by_index.items():
            assert layer.attn_backend.get_name() == ("CPU_ATTN" if index in unquantized else "INT8_KV")
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_options_reach_the_worker_which_logs_them(model_folder, auto_run, monkeypatch):
    expected, _ = auto_run(tiny_models.llama)
    log: list[str] = []
    monkeypatch.setattr(startup_log.logger, "info_once", lambda message, *args: log.append(message % args))
    options = {"int8_kv": {"rotate_keys": False, "cpu_isa": "scalar"}}
    with tiny_engine(model_folder(tiny_models.llama), additional_config=options) as llm:
        assert not any(layer.impl.rotate_keys for layer in layers(llm).values())
        (line,) = (line for line in log if "keys not rotated" in line)
        assert "scalar kernels; 792 bytes per token instead of 1536 (bfloat16), 1.94x" in line
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_compiled_in_a_spawned_worker(model_folder, auto_run):
    """vLLM's defaults: torch.compile, the engine and its worker in processes of their own."""
    expected, _ = auto_run(tiny_models.llama)
    with tiny_engine(model_folder(tiny_models.llama), own_process=True, enforce_eager=False) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_tensor_parallel(model_folder, auto_run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected, _ = auto_run(tiny_models.llama)
    with tiny_engine(model_folder(tiny_models.llama), own_process=True, tensor_parallel_size=2) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL

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

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from engines import MAX_KL, engine, kl_per_token, layers, num_cache_tokens, prompt_logprobs, tiny_engine
from support import supports

from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import FORMATS, K8V8
from vllm_int8kv.serving import attention
from vllm_int8kv.serving.start_up import log as startup_log

pytestmark = pytest.mark.engine

NEAR_TIE = 0.1
PRICE_LIST = " ".join(f"Item {i} costs {i * 7 % 50} coins." for i in range(24))
QUESTIONS = [
    "What is the capital of France?",
    "How many days does a week have?",
    "Name three colors of the rainbow.",
    PRICE_LIST + " What does item 3 cost?",
]


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


# The real model.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from vllm_int8kv.commands.models import smollm2

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


@supports("prefix caching", "the same tokens as without")
def test_prefix_cache_hits_do_not_change_answers(int8_answers):
    first, second, _ = int8_answers
    assert first[-1].num_cached_tokens == 0
    assert second[-1].num_cached_tokens >= 64
    assert [a.tokens for a in second] == [a.tokens for a in first]


@supports("chunked prefill", "the same tokens as without")
def test_chunked_prefill_without_prefix_cache_does_not_change_answers(smollm2, int8_answers):
    options = dict(dtype="float32", max_num_batched_tokens=48, max_num_seqs=4, enable_prefix_caching=False)
    with engine(smollm2, **options) as llm:
        answers = ask(llm)
    assert answers[-1].num_prompt_tokens > 4 * 48  # so it cannot have been prefilled in one step
    assert [a.tokens for a in answers] == [a.tokens for a in int8_answers[0]]


@supports("preemption and recomputation", "the same tokens as without")
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


@supports("Llama, Mistral, Gemma-2, Gemma-3, GPT-OSS: GQA, sliding window, softcap, sinks", "KL to vLLM's own cache")
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_random_model_is_close_to_auto(model, model_folder, auto_run):
    expected, auto_tokens = auto_run(model)
    with tiny_engine(model_folder(model)) as llm:
        for layer in layers(llm).values():
            assert layer.kv_cache.dtype == torch.int8
            _, num_kv_heads, block_size, num_bytes = layer.kv_cache.shape
            assert num_bytes == K8V8.content_bytes(layer.head_size)
            # Blocks lie side by side without padding, sliding-window layers included.
            assert layer.kv_cache.stride(0) == num_kv_heads * block_size * num_bytes
        assert num_cache_tokens(llm) / auto_tokens >= 1.9
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_comparison_notices_a_wrong_window(model_folder, auto_run, monkeypatch):
    expected, _ = auto_run(tiny_models.mistral)
    original = attention.Int8KVImpl.forward

    def one_token_more(self, *args, **kwargs):
        window, self.sliding_window = self.sliding_window, self.sliding_window + 1
        try:
            return original(self, *args, **kwargs)
        finally:
            self.sliding_window = window

    monkeypatch.setattr(attention.Int8KVImpl, "forward", one_token_more)
    with tiny_engine(model_folder(tiny_models.mistral)) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) > 2 * MAX_KL


@supports("`kv_cache_dtype_skip_layers` by index and `sliding_window`", "KL to vLLM's own cache")
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
        assert not any(layer.impl.key_transform.rotate for layer in layers(llm).values())
        (line,) = (line for line in log if "keys not rotated" in line)
        assert "scalar kernels; 792 bytes per token instead of 1536 (bfloat16), 1.94x" in line
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


def test_the_kernels_that_an_engine_asks_for_are_its_own(model_folder, monkeypatch):
    """The next engine of the process, and whoever calls an operator, has those of the process."""
    used: list[str | None] = []
    paged_attention = attention.ops.paged_attention

    def noted(*args, cpu_isa=None, **options):
        used.append(cpu_isa)
        return paged_attention(*args, cpu_isa=cpu_isa, **options)

    monkeypatch.setattr(attention.ops, "paged_attention", noted)
    fastest = library.cpu_isa()
    for isa in ("scalar", None):
        used.clear()
        with tiny_engine(model_folder(tiny_models.llama), additional_config={"int8_kv": {"cpu_isa": isa}}) as llm:
            prompt_logprobs(llm)
        assert set(used) == {isa} and library.cpu_isa() == fastest


# Random models have larger divergences than trained ones; each bit costs a factor of about four.
FORMAT_KL = {"k8v4": 0.1, "k6v6": 0.04, "k6v4": 0.12, "k4v4": 0.4}


@pytest.mark.parametrize("name", FORMAT_KL)
@supports("formats below 8 bits (k6v4, k4v4 and others), on CPU", "KL to vLLM's own cache; tokens by vLLM's own count")
def test_formats_below_8_bits(name, model_folder, auto_run):
    """Grouped queries, and a sliding window beside full layers, soft-capped."""
    for model in (tiny_models.llama, tiny_models.gemma2):
        expected, auto_tokens = auto_run(model)
        with tiny_engine(model_folder(model), additional_config={"int8_kv": {"format": name}}) as llm:
            assert {layer.impl.cache_format.name for layer in layers(llm).values()} == {name}
            kl = kl_per_token(expected, prompt_logprobs(llm))
            assert 1e-4 < kl < FORMAT_KL[name]
            ratio = num_cache_tokens(llm) / auto_tokens
            arithmetic = 256 / FORMATS[name].content_bytes(64)
            assert abs(ratio / arithmetic - 1) < 0.02


def test_a_format_answers_the_same_with_prefix_hits_and_chunks(smollm2):
    """And the right thing: three times the tokens of bf16 still know where Paris is."""
    options = {"dtype": "float32", "additional_config": {"int8_kv": {"format": "k6v4"}}}
    with engine(smollm2, block_size=64, **options) as llm:
        first, second = ask(llm), ask(llm)
    with engine(smollm2, max_num_batched_tokens=48, max_num_seqs=4, enable_prefix_caching=False, **options) as llm:
        chunked = ask(llm)
    assert second[-1].num_cached_tokens >= 64
    assert [a.tokens for a in second] == [a.tokens for a in first] == [a.tokens for a in chunked]
    assert "Paris" in first[0].text


@supports("Gemma-3n: layers that share a KV cache, with skipped layers", "they are as the layer whose cache they read")
@pytest.mark.parametrize(
    ("options", "unquantized"),
    [
        ({"kv_cache_dtype_skip_layers": ["1"]}, {1, 3}),  # vLLM lets layer 3 read the cache of layer 1
        ({"kv_cache_dtype_skip_layers": ["3"]}, set()),
        ({"kv_cache_dtype_skip_layers": ["2"]}, {2, 4}),  # and layer 4 that of layer 2
        ({"kv_cache_dtype_skip_layers": ["4"]}, set()),
        ({"kv_cache_dtype_skip_layers": ["sliding_window"]}, {0, 2, 4}),  # layer 3 has a window too, 1 and 4 have none
        ({"additional_config": {"int8_kv": {"layer_policy": {2: "auto", 3: "auto"}}}}, {2, 4}),
    ],
    ids=["owner", "reader", "another_owner", "another_reader", "sliding_window", "policy"],
)
def test_a_layer_that_reads_another_ones_cache_is_as_that_one(options, unquantized, model_folder, auto_run):
    expected, _ = auto_run(tiny_models.gemma3n)
    with tiny_engine(model_folder(tiny_models.gemma3n), **options) as llm:
        names = {index: layer.attn_backend.get_name() for index, layer in layers(llm).items()}
        assert names == {index: "CPU_ATTN" if index in unquantized else "INT8_KV" for index in range(5)}
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


@supports("`torch.compile`, spawned workers", "KL to vLLM's own cache")
def test_compiled_in_a_spawned_worker(model_folder, auto_run):
    """vLLM's defaults: torch.compile, the engine and its worker in processes of their own."""
    expected, _ = auto_run(tiny_models.llama)
    with tiny_engine(model_folder(tiny_models.llama), own_process=True, enforce_eager=False) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL


@supports("tensor parallel", "two ranks: KL to vLLM's own cache")
def test_tensor_parallel(model_folder, auto_run, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    expected, _ = auto_run(tiny_models.llama)
    with tiny_engine(model_folder(tiny_models.llama), own_process=True, tensor_parallel_size=2) as llm:
        assert kl_per_token(expected, prompt_logprobs(llm)) < MAX_KL

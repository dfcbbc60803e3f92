"""Inputs of layers in place of keys and values, through engines: what returns is what was computed."""

import shutil
from pathlib import Path

import engines
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from support import refuses, supports
from test_store_engine import (
    BLOCK_SIZE,
    FAULTS,
    FULL,
    LENGTHS,
    chain_of,
    count_of,
    fill,
    generate,
    store_config,
    store_engine,
    stored,
    wait_for_files,
)
from transformers import AutoConfig

import vllm_int8kv
from vllm_int8kv.store.inputs.latents import Basis

pytestmark = pytest.mark.engine

ARCHITECTURES = {
    "llama": tiny_models.multi_head,
    "qwen2": tiny_models.qwen2,
    "qwen3": tiny_models.qwen3,
    "phi": tiny_models.phi,
    "opt": tiny_models.opt,
    "gemma3": tiny_models.gemma3,
    "bloom": tiny_models.bloom,
    "gpt_oss": tiny_models.gpt_oss,
    "gemma3n": tiny_models.gemma3n,
    "falcon": tiny_models.falcon,
}
NATIVE = ("llama", "phi", "falcon")
"""With a cache of vLLM's own; its code of Falcon has no other."""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(7)
    return [torch.randint(3, tiny_models.VOCAB_SIZE, (length,)).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def llama(models) -> Path:
    vllm_int8kv.register()
    return models["llama"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """All written before the first engine: vLLM changes classes of transformers that it serves itself."""
    root = tmp_path_factory.mktemp("models")
    return {name: write(root / name) for name, write in ARCHITECTURES.items()}


def cache_of(llm, num_blocks: int) -> list[torch.Tensor]:
    """The first blocks of every layer's cache; block 0 is vLLM's null block."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values() if hasattr(layer, "kv_cache")]
    return [cache[1 : 1 + num_blocks].clone() for cache in caches if cache.numel()]


@supports(
    "the KV store, inputs of layers in place of K and V (Llama, Qwen2, Qwen3, Phi, OPT, Gemma-3, ...)",
    "another engine projects the same bytes into its cache",
)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        *((name, {}) for name in ARCHITECTURES if name != "falcon"),
        *((name, {"kv_cache_dtype": "auto"}) for name in NATIVE),
    ],
    ids=lambda x: x if isinstance(x, str) else x.get("kv_cache_dtype", "int8_custom"),
)
def test_inputs_become_the_keys_and_values_they_were(models, architecture, options, prompts, tmp_path):
    vllm_int8kv.register()
    model, root = models[architecture], tmp_path / "store"
    found = []
    for cached in (0, FULL[0]):
        with store_engine(model, root, codec="x", **options) as llm:
            answers = generate(llm, prompts[:1])
            assert answers[1] == [cached]
            wait_for_files(root, FULL[0] // BLOCK_SIZE)
            found.append((answers[0], cache_of(llm, FULL[0] // BLOCK_SIZE)))
    assert found[0][0] == found[1][0]
    assert len(found[0][1]) > 0
    for before, after in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 48, "max_num_seqs": 2},
        {"additional_config": {"int8_kv": {"layer_policy": {0: "k4v4", 1: "auto", 2: "k8v8"}}}},
        {"codec": "x+zstd", "max_num_batched_tokens": 40, "max_num_seqs": 4},
    ],
    ids=["chunked prefill", "policy", "zstd"],
)
def test_another_engine_answers_the_same(llama, prompts, tmp_path, options):
    options = {"codec": "x"} | options
    expected = fill(llama, tmp_path, prompts, **options)
    before = {path: path.read_bytes() for path in stored(tmp_path)}
    with store_engine(llama, tmp_path, **options) as llm:
        assert generate(llm, prompts) == (expected, FULL)
    assert {path: path.read_bytes() for path in stored(tmp_path)} == before


@pytest.mark.parametrize(("codec", "max_kl"), [("x8", 0.02), ("xcl8+zstd", 0.02), ("x4", 0.5), ("xsvd:0.01", 0.02)])
def test_codecs_that_lose_something_are_near(llama, prompts, tmp_path, codec, max_kl):
    from vllm import SamplingParams

    fill(llama, tmp_path, prompts, codec=codec)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    rows = []
    for root in (tmp_path / "empty", tmp_path):
        with store_engine(llama, root, codec=codec, max_logprobs=-1) as llm:
            outputs = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
            assert outputs[0].num_cached_tokens == (FULL[0] if root == tmp_path else 0)
            logprobs = outputs[0].outputs[0].logprobs[0]
            rows.append(torch.tensor([[logprobs[token].logprob for token in range(tiny_models.VOCAB_SIZE)]]))
    assert 0 < engines.kl_per_token(*rows) < max_kl


def test_answers_are_stored_and_preempted_requests_go_on(llama, tmp_path):
    """A cache with room for a few of the requests, whose answers fill blocks token by token."""
    torch.manual_seed(5)
    many = [torch.randint(3, tiny_models.VOCAB_SIZE, (70,)).tolist() for _ in range(6)]
    with engines.tiny_exact_engine(llama, block_size=BLOCK_SIZE) as llm:
        expected, _ = generate(llm, many, max_tokens=100)
    for cached in (0, 4 * BLOCK_SIZE):
        with store_engine(llama, tmp_path, codec="x", num_gpu_blocks_override=16) as llm:
            assert generate(llm, many, max_tokens=100)[0] == expected
            longer = [prompt + answer for prompt, answer in zip(many, expected, strict=True)]
            if cached:
                assert min(generate(llm, longer, max_tokens=1)[1]) >= cached


def test_drafts_that_are_refused_leave_no_trace(llama, tmp_path):
    """N-grams propose what is often wrong: those tokens' inputs are overwritten by the right ones."""
    torch.manual_seed(9)
    pattern = torch.randint(3, tiny_models.VOCAB_SIZE, (12,)).tolist()
    repeating = [pattern * 6, pattern * 4 + pattern[:5]]
    speculative = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}
    expected = fill_and_answer(llama, tmp_path, repeating, **speculative)
    with store_engine(llama, tmp_path, codec="x") as llm:
        longer = [prompt + answer for prompt, answer in zip(repeating, expected, strict=True)]
        found, cached = generate(llm, longer)
        assert min(cached) > len(repeating[0]) // BLOCK_SIZE * BLOCK_SIZE
    with engines.tiny_exact_engine(llama, block_size=BLOCK_SIZE) as llm:
        assert generate(llm, longer)[0] == found


def fill_and_answer(model: Path, root: Path, prompts, **options) -> list[list[int]]:
    with store_engine(model, root, codec="x", **options) as llm:
        answers, _ = generate(llm, prompts, max_tokens=60)
        wait_for_files(root, 3)
    return answers


def test_ranks_share_one_file(llama, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parallel = {"own_process": True, "tensor_parallel_size": 2, "codec": "x"}
    expected = fill(llama, tmp_path, prompts, **parallel)
    assert len({path.parents[1] for path in stored(tmp_path)}) == 1  # namespaces
    assert len(stored(tmp_path)) == sum(FULL) // BLOCK_SIZE + 1
    with store_engine(llama, tmp_path, **parallel) as llm:
        assert generate(llm, prompts) == (expected, FULL)


def test_what_k_and_v_are_made_of_is_known_on_all_ranks(llama, prompts, tmp_path, monkeypatch):
    """Projections of weights that a CPU has packed, a part on each rank, say what the file of weights says."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    weights = load_file(llama / "model.safetensors")
    values = []
    for layer in range(AutoConfig.from_pretrained(llama).num_hidden_layers):
        both = [weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].float() for name in "kv"]
        values.append(torch.linalg.svdvals(torch.cat([own / own.norm() for own in both])))
    for options in ({}, {"own_process": True, "tensor_parallel_size": 2}):
        root = tmp_path / str(len(options))
        fill(llama, root, prompts, codec="xsvd:0.02", **options)
        (path,) = root.glob(f"*/{Basis.name}")
        for found, own in zip(Basis.read(path.parent).singular_values, values, strict=True):
            torch.testing.assert_close(found.flip(0), own[: len(found)], rtol=1e-3, atol=1e-3)


def test_a_compiled_model_is_seen_as_well(llama, prompts, tmp_path):
    """One that was compiled without hooks lies in vLLM's cache of compiled models, and must not be taken."""
    compiled = {"own_process": True, "enforce_eager": False}
    with engines.tiny_exact_engine(llama, block_size=BLOCK_SIZE, **compiled) as llm:
        expected, _ = generate(llm, prompts)
    assert fill(llama, tmp_path, prompts, codec="x", **compiled) == expected


def test_blocks_that_find_no_room_are_counted(llama, tmp_path):
    torch.manual_seed(4)
    many = [torch.randint(3, tiny_models.VOCAB_SIZE, (100,)).tolist() for _ in range(8)]
    config = store_config(tmp_path, codec="x", max_queued_bytes=1 << 20)
    assert 8 * 3 * 3 * BLOCK_SIZE * 192 * 4 > 1 << 20  # the whole blocks of all prompts, in one step
    with engines.tiny_exact_engine(llama, block_size=BLOCK_SIZE) as llm:
        expected, _ = generate(llm, many)
    options = {"block_size": BLOCK_SIZE, "max_num_batched_tokens": 1024, "kv_transfer_config": config}
    with engines.tiny_exact_engine(llama, **options) as llm:
        counts = count_of(llm, lambda: generate(llm, many)[0], expected)
        assert counts["dropped_blocks"] > 0
    with engines.tiny_exact_engine(llama, **options) as llm:
        answers, cached = generate(llm, many)
        assert answers == expected and 0 < sum(cached) < 8 * 96


def test_layers_without_one_projection_are_refused():
    from vllm_int8kv.store.engine.projections import find_projections

    attention = torch.nn.Identity()
    attention.layer_name = "model.layers.0.self_attn.attn"
    parent = torch.nn.Module()
    parent.attn, parent.q_proj, parent.kv_proj = attention, torch.nn.Linear(4, 4), torch.nn.Linear(4, 8)
    problem = r"layer model.layers.0.self_attn.attn \(Module\): it has 0 projections of Q, K and V"
    with pytest.raises(ValueError, match=problem):
        find_projections(torch.nn.Sequential(parent), [attention])


@pytest.fixture(scope="module")
def answers_and_store(llama, prompts, tmp_path_factory) -> tuple[list[list[int]], Path]:
    root = tmp_path_factory.mktemp("store")
    return fill(llama, root, prompts, codec="x"), root


@pytest.fixture
def answers(answers_and_store) -> list[list[int]]:
    """Of an engine that computed everything."""
    return answers_and_store[0]


@pytest.fixture
def store(answers_and_store, tmp_path) -> Path:
    """A copy of the folder that this engine filled."""
    return Path(shutil.copytree(answers_and_store[1], tmp_path / "store"))


@pytest.mark.parametrize(("fault", "place"), [*((fault, 2) for fault in FAULTS), ("truncated", 0)])
def test_bad_files_are_computed_again(llama, prompts, answers, store, fault, place):
    with store_engine(llama, store, codec="x") as llm:
        (path,) = [path for path in stored(store) if path.stem == chain_of(prompts[0])[place]]
        FAULTS[fault](path)
        counts = count_of(llm, lambda: generate(llm, prompts[:1])[0], answers[:1])
        assert counts["failed_blocks"] == 1
        assert generate(llm, prompts[1:]) == (answers[1:], FULL[1:])
    if fault == "truncated":
        with store_engine(llama, store, codec="x") as llm:
            assert generate(llm, prompts[:1]) == (answers[:1], FULL[:1])  # written anew


@pytest.mark.parametrize(
    "other",
    [
        {"additional_config": {"int8_kv": {"format": "k6v6"}}},
        {"additional_config": {"int8_kv": {"rotate_keys": False}}},
        {"kv_cache_dtype": "auto"},
        {"block_size": 64},
        {"dtype": "bfloat16"},
        {"codec": "x8"},
        {"codec": "exact"},
        {"model": "other weights"},
    ],
    ids=lambda other: next(iter(str(value) for value in other.values())),
)
def test_an_engine_of_another_kind_finds_nothing(llama, prompts, store, tmp_path, other):
    model = llama if "model" not in other else tiny_models.llama(tmp_path / "other", seed=1)
    options = {"block_size": BLOCK_SIZE, "dtype": "float32"} | {k: v for k, v in other.items() if k != "model"}
    config = store_config(store, codec=options.pop("codec", "x"))
    with engines.engine(
        model, max_model_len=256, skip_tokenizer_init=True, kv_transfer_config=config, **options
    ) as llm:
        assert generate(llm, prompts)[1] == [0] * len(prompts)


def test_a_layer_that_cannot_be_filled_lets_nobody_wait(llama, prompts, answers, store, monkeypatch):
    from vllm_int8kv.store.engine.projections import Projection

    def broken(self, *args):
        raise RuntimeError("no room for a product")

    monkeypatch.setattr(Projection, "write", broken)
    with store_engine(llama, store, codec="x") as llm:
        assert generate(llm, prompts)[0] == answers


@refuses("the KV store, inputs of layers with LoRA", "by the connector: adapters change what K and V are made of them")
def test_adapters_are_refused(llama, tmp_path):
    problem = "cannot store inputs of layers with enable_lora=True"
    lora = {"enable_lora": True, "max_lora_rank": 8}
    with pytest.raises((ValueError, RuntimeError), match=problem), store_engine(llama, tmp_path, codec="x8", **lora):
        pass

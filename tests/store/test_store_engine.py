"""The store through engines: equal answers from loaded blocks, and a miss for everything else."""

import json
import shutil
import time
from pathlib import Path

import engines
import pytest
import tiny_models
import torch
from support import refuses, supports

import vllm_int8kv
from vllm_int8kv.store import files

pytestmark = pytest.mark.engine

BLOCK_SIZE = 32
LENGTHS = (130, 64, 33, 31)
"""Of prompts: four blocks and a rest, a whole number of blocks, one token more than a block, less than one."""
FULL = [length // BLOCK_SIZE * BLOCK_SIZE for length in LENGTHS]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    vllm_int8kv.register()
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    torch.manual_seed(7)
    return [torch.randint(3, tiny_models.VOCAB_SIZE, (length,)).tolist() for length in LENGTHS]


def store_config(root: Path, **options) -> dict:
    extra = {"path": str(root)} | options
    return {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "vllm_int8kv.store",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


def store_engine(model: Path, root: Path, codec: str = "exact", max_bytes: int | None = None, **options):
    config = store_config(root, codec=codec, max_bytes=max_bytes)
    return engines.tiny_exact_engine(model, block_size=BLOCK_SIZE, kv_transfer_config=config, **options)


def generate(llm, prompts, max_tokens=12, **options):
    """Greedy answers and how many tokens of each prompt were not computed."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False, **options)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


def stored(root: Path) -> list[Path]:
    return sorted(root.rglob(f"*{files.SUFFIX}"))


def wait_for_files(root: Path, count: int) -> None:
    """Until the thread that saves has written so many."""
    deadline = time.monotonic() + 120
    while len(stored(root)) < count:
        assert time.monotonic() < deadline, f"{len(stored(root))} of {count} files"
        time.sleep(0.01)


def fill(model: Path, root: Path, prompts, **options) -> list[list[int]]:
    """The answers of an engine that computes everything, and saves it."""
    with store_engine(model, root, **options) as llm:
        answers, cached = generate(llm, prompts)
        assert cached == [0] * len(prompts)
        # Answers fill blocks too: 130 + 12 tokens do not, 64 + 12 do not, 33 + 12 do not, 31 + 11 fill one.
        wait_for_files(root, sum(FULL) // BLOCK_SIZE + 1)
    return answers


@pytest.fixture(scope="module")
def answers_and_store(llama, prompts, tmp_path_factory) -> tuple[list[list[int]], Path]:
    root = tmp_path_factory.mktemp("store")
    return fill(llama, root, prompts), root


@pytest.fixture
def answers(answers_and_store) -> list[list[int]]:
    """Of an engine that computed everything."""
    return answers_and_store[0]


@pytest.fixture
def store(answers_and_store, tmp_path) -> Path:
    """A copy of the folder that this engine filled."""
    return Path(shutil.copytree(answers_and_store[1], tmp_path / "store"))


@supports("the KV store, with any format, policy, or cache of vLLM's own", "another engine gives the same answers")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_cache_dtype": "auto"},
        {"additional_config": {"int8_kv": {"format": "k6v4"}}},
        {"additional_config": {"int8_kv": {"layer_policy": {0: "k4v4", 1: "auto", 2: "k8v8"}}}},
        {"max_num_batched_tokens": 48, "max_num_seqs": 2},
        {"codec": "exact+zstd"},
    ],
    ids=["k8v8", "auto", "k6v4", "policy", "chunked prefill", "zstd"],
)
def test_another_engine_answers_the_same_from_the_store(llama, prompts, tmp_path, options):
    expected = fill(llama, tmp_path, prompts, **options)
    before = {path: path.read_bytes() for path in stored(tmp_path)}
    with store_engine(llama, tmp_path, **options) as llm:
        assert generate(llm, prompts) == (expected, FULL)
        assert llm.llm_engine.vllm_config.kv_transfer_config.kv_load_failure_policy == "recompute"
    assert {path: path.read_bytes() for path in stored(tmp_path)} == before


@pytest.mark.parametrize(("codec", "max_kl"), [("k6v4", 0.2), ("bound:0.05", 0.06)])
def test_codecs_that_lose_something_are_near(llama, prompts, tmp_path, codec, max_kl):
    """Log-probabilities after a hit against those of an engine that computes everything; the model is random."""
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


def test_prompts_share_what_they_have_in_common(llama, prompts, store):
    with store_engine(llama, store) as llm:
        longer = [prompts[0][:96] + prompts[1], prompts[0][:95] + prompts[1]]
        _, cached = generate(llm, longer)
        assert cached == [96, 64]
        assert generate(llm, [prompts[0]])[1] == [128]  # 96 of this engine, 32 of the store


@pytest.mark.parametrize(
    "other",
    [
        {"additional_config": {"int8_kv": {"format": "k6v6"}}},
        {"additional_config": {"int8_kv": {"rotate_keys": False}}},
        {"additional_config": {"int8_kv": {"equalize_keys": False}}},
        {"additional_config": {"int8_kv": {"layer_policy": {1: "k4v4"}}}},
        {"kv_cache_dtype": "auto"},
        {"block_size": 64},
        {"dtype": "bfloat16"},
        {"codec": "k6v4"},
        {"model": "other weights"},
    ],
    ids=lambda other: next(iter(str(value) for value in other.values())),
)
def test_an_engine_of_another_kind_finds_nothing(llama, prompts, store, tmp_path, other):
    model = llama if "model" not in other else tiny_models.llama(tmp_path / "other", seed=1)
    options = {"block_size": BLOCK_SIZE, "dtype": "float32"} | {k: v for k, v in other.items() if k != "model"}
    config = store_config(store, codec=options.pop("codec", "exact"))
    with engines.engine(
        model, max_model_len=256, skip_tokenizer_init=True, kv_transfer_config=config, **options
    ) as llm:
        assert generate(llm, prompts)[1] == [0] * len(prompts)


FAULTS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-500] + bytes(500)),
    "foreign": lambda path: path.write_bytes(b"something else"),
    "another block": lambda path: path.write_bytes(stored(path.parents[2])[-1].read_bytes()),
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize(("fault", "place"), [*((fault, 2) for fault in FAULTS), ("truncated", 0)])
def test_bad_files_are_computed_again(llama, prompts, answers, store, fault, place):
    with store_engine(llama, store) as llm:
        (path,) = [path for path in stored(store) if path.stem == chain_of(prompts[0])[place]]
        FAULTS[fault](path)
        counts = count_of(llm, lambda: generate(llm, prompts[:1])[0], answers[:1])
        assert counts["failed_blocks"] == 1
        assert generate(llm, prompts[1:]) == (answers[1:], FULL[1:])
    if fault == "truncated":
        with store_engine(llama, store) as llm:
            assert generate(llm, prompts[:1]) == (answers[:1], FULL[:1])  # written anew


def count_of(llm, run, expected) -> dict[str, float]:
    """What the store counts while `run` returns what is expected."""
    from vllm_int8kv.store.engine.connector import KVStoreConnector

    total: dict[str, float] = {}
    original = KVStoreConnector.get_kv_connector_stats

    def spy(self):
        if (stats := original(self)) is not None:
            for name, value in json.loads(json.dumps(stats.to_dict())).items():
                total[name] = total.get(name, 0) + value
        return stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVStoreConnector, "get_kv_connector_stats", spy)
        assert run() == expected
    return total


def chain_of(prompt: list[int]) -> list[str]:
    from vllm_int8kv.store.namespace import block_hash

    chain: list[str] = []
    for begin in range(0, len(prompt) - BLOCK_SIZE + 1, BLOCK_SIZE):
        chain.append(block_hash(chain[-1] if chain else "", prompt[begin : begin + BLOCK_SIZE], None))
    return chain


def test_ranks_have_files_of_their_own(llama, prompts, store, monkeypatch):
    """Two ranks beside an engine of one, on one folder: each finds its own blocks, and a block needs both ranks'."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = stored(store)
    parallel = {"own_process": True, "tensor_parallel_size": 2}
    with store_engine(llama, store, **parallel) as llm:
        expected, cached = generate(llm, prompts)
        assert cached == [0] * len(prompts)
        wait_for_files(store, 3 * len(alone))
    new = sorted(set(stored(store)) - set(alone))
    assert len({path.parents[1] for path in new}) == 2  # namespaces
    next(path for path in new if path.stem == chain_of(prompts[0])[0]).unlink()
    with store_engine(llama, store, **parallel) as llm:
        assert generate(llm, prompts) == (expected, [0, *FULL[1:]])


def test_a_request_may_be_aborted_while_its_blocks_are_loaded(llama, prompts, answers, store, monkeypatch):
    from vllm import SamplingParams

    from vllm_int8kv.store.engine.transfers import Transfers

    original = Transfers._read_batch

    def slow(self, blocks):
        time.sleep(0.3)
        return original(self, blocks)

    monkeypatch.setattr(Transfers, "_read_batch", slow)
    with store_engine(llama, store) as llm:
        free = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks
        before = free()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
        llm.llm_engine.add_request("aborted", {"prompt_token_ids": prompts[0]}, params)
        for _ in range(3):
            llm.llm_engine.step()
        assert free() < before
        llm.llm_engine.abort_request(["aborted"])
        assert generate(llm, prompts) == (answers, FULL)
        assert free() == before


def test_requests_with_one_prefix_at_the_same_time(llama, prompts, answers, store):
    with store_engine(llama, store) as llm:
        found, _ = generate(llm, [prompts[0], prompts[0], prompts[1], prompts[0]])
        assert found == [answers[0], answers[0], answers[1], answers[0]]


def test_preempted_requests_go_on_from_the_store(llama, tmp_path):
    """A cache with room for a few of the requests, whose answers are long."""
    torch.manual_seed(5)
    many = [torch.randint(3, tiny_models.VOCAB_SIZE, (70,)).tolist() for _ in range(6)]
    with engines.tiny_exact_engine(llama, block_size=BLOCK_SIZE) as llm:
        expected, _ = generate(llm, many, max_tokens=100)
    small = {"num_gpu_blocks_override": 16}
    for _ in range(2):
        with store_engine(llama, tmp_path, **small) as llm:
            assert generate(llm, many, max_tokens=100)[0] == expected


def test_adapters_of_one_name_are_told_apart(llama, prompts, tmp_path):
    from lora_adapter import write_adapter
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_lora_rank": 8}
    folder, found = tmp_path / "adapter", []
    for seed in (1, 2, 1):
        write_adapter(folder, seed)
        with store_engine(llama, tmp_path / "store", **options) as llm:
            request = LoRARequest("adapter", 1, str(folder))
            found.append(generate(llm, prompts, lora_request=request))
            time.sleep(1)
    assert found[0][0] != found[1][0] and found[2] == (found[0][0], FULL)
    assert found[0][1] == found[1][1] == [0] * len(prompts)


@pytest.mark.parametrize("step", ["_read_batch", "_decode"])
def test_a_loader_that_fails_lets_nobody_wait(llama, prompts, answers, store, monkeypatch, step):
    from vllm_int8kv.store.engine.transfers import Transfers

    monkeypatch.setattr(Transfers, step, out_of_memory)
    with store_engine(llama, store) as llm:
        counts = count_of(llm, lambda: generate(llm, prompts)[0], answers)
        assert counts["failed_blocks"] and "loaded_blocks" not in counts
        assert generate(llm, prompts)[0] == answers


def test_a_cache_that_cannot_be_filled_lets_nobody_wait(llama, prompts, answers, store, monkeypatch):
    from vllm_int8kv.store.engine.contents import PageContents

    monkeypatch.setattr(PageContents, "put", out_of_memory)
    with store_engine(llama, store) as llm:
        counts = count_of(llm, lambda: generate(llm, prompts)[0], answers)
        assert counts["failed_blocks"] and "loaded_blocks" not in counts
        assert generate(llm, prompts)[0] == answers


def out_of_memory(self, *_):
    raise MemoryError("no room for a batch")


def test_a_block_that_was_evicted_is_computed_again(llama, prompts, answers, store):
    with store_engine(llama, store) as llm:
        lookups = llm.llm_engine.engine_core.engine_core.scheduler.connector._lookups
        chain = chain_of(prompts[0])
        for block in chain:
            lookups.index.add(block)  # as it was when somebody asked
        next(path for path in stored(store) if path.stem == chain[1]).unlink()
        counts = count_of(llm, lambda: generate(llm, prompts[:1])[0], answers[:1])
        assert counts["missing_blocks"] == 1 and "failed_blocks" not in counts


@refuses("the KV store, of models all of whose layers see a window", "by the connector: blocks outlive the window")
def test_layers_that_see_a_window_are_refused(tmp_path):
    model = tiny_models.mistral(tmp_path / "mistral")
    problem = r"layers of this model \(SlidingWindowSpec\): blocks are kept of layers that see all tokens"
    with pytest.raises((ValueError, RuntimeError), match=problem), store_engine(model, tmp_path):
        pass


def test_a_weight_update_that_has_begun_ends_the_use_of_the_store(llama, prompts, store):
    with store_engine(llama, store) as llm:
        connector = llm.llm_engine.engine_core.engine_core.scheduler.connector
        worker = llm.llm_engine.model_executor.driver_worker.worker
        worker._weight_update_active = True
        llm.collective_rpc("check_health")
        assert connector._lookups is None
        worker._weight_update_active = False
        assert generate(llm, prompts)[1] == [0] * len(prompts)


def test_a_folder_that_cannot_be_written_costs_nothing_but_hits(llama, prompts, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    with store_engine(llama, tmp_path) as llm:
        answers, cached = generate(llm, prompts)
        assert cached == [0] * len(prompts)
        assert generate(llm, prompts)[0] == answers
    assert stored(tmp_path) == []


def test_the_folder_stays_below_its_limit(llama, tmp_path):
    torch.manual_seed(3)
    many = [torch.randint(3, tiny_models.VOCAB_SIZE, (128,)).tolist() for _ in range(24)]
    with store_engine(llama, tmp_path, max_bytes=1 << 20) as llm:
        answers, _ = generate(llm, many)
        wait_for_files(tmp_path, 10)
        time.sleep(1)
        assert sum(path.stat().st_size for path in stored(tmp_path)) <= 1 << 20
    with store_engine(llama, tmp_path, max_bytes=1 << 20) as llm:
        again, cached = generate(llm, many[-4:])  # what was used last is there
        assert again == answers[-4:] and cached == [128] * 4


def test_new_weights_end_the_use_of_the_store(llama, prompts, store, tmp_path):
    """What the old weights computed is nothing to the new ones, and the other way round."""
    before = stored(store)
    other = tiny_models.llama(tmp_path / "other", seed=1)
    with store_engine(llama, store) as llm:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        expected, cached = generate(llm, prompts)
        assert cached == [0] * len(prompts)
    assert stored(store) == before
    with engines.tiny_exact_engine(other, block_size=BLOCK_SIZE) as llm:
        assert generate(llm, prompts)[0] == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"enable_prefix_caching": False}, "enable_prefix_caching=False: blocks are found as the prefix cache finds"),
        ({"codec": "zip"}, "codec must be exact, a cache format"),
        ({"codec": "k6v4", "kv_cache_dtype": "auto"}, "codec 'k6v4' needs kv_cache_dtype='int8_custom'"),
    ],
)
def test_what_cannot_be_stored_is_refused(llama, tmp_path, options, problem):
    with pytest.raises((ValueError, RuntimeError), match=problem), store_engine(llama, tmp_path, **options):
        pass


def test_what_happened_is_counted(llama, prompts, answers, store):
    with store_engine(llama, store) as llm:
        counts = count_of(llm, lambda: generate(llm, prompts), (answers, FULL))
    assert counts["loaded_blocks"] == sum(FULL) // BLOCK_SIZE and "failed_blocks" not in counts
    assert counts["loaded_bytes"] > 0 and counts["load_seconds"] > 0

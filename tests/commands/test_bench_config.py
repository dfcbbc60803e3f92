"""The files in `configs/`: every one loads, every key is documented, whatever else is refused by name."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from vllm_int8kv.commands import models, serve
from vllm_int8kv.commands.bench import config as bench_config
from vllm_int8kv.commands.bench import replica, sweep, workload
from vllm_int8kv.evaluation.cache_spec import CacheSpec

ROOT = Path(__file__).resolve().parents[2]
BENCH = sorted((ROOT / "configs" / "bench").glob("*.yaml"))
SERVE = sorted((ROOT / "configs" / "serve").glob("*.yaml"))
GOOD = {
    "mode": "offline",
    "device": "cpu",
    "model": "smollm2",
    "kv_cache_dtypes": ["auto", "int8_custom"],
    "cases": [{"num_requests": 8, "input_len": 64, "output_len": 16}],
}
CASE = GOOD["cases"][0]
K6V4 = "int8_custom:format=k6v4"


def load(tmp_path, **changes):
    path = tmp_path / "bench.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return bench_config.load(path)


@pytest.mark.parametrize("path", BENCH, ids=lambda path: path.stem)
def test_bench_configurations_load_and_vllm_knows_their_arguments(path):
    from vllm.engine.arg_utils import EngineArgs

    config = bench_config.load(path)
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    assert config.engine_args.keys() <= known
    assert config.kv_cache_dtypes[0].name == "auto", "the baseline"


def test_every_key_is_documented_and_frozen(tmp_path):
    config = load(tmp_path)
    for kind, key in ((config, "rounds"), (config.cases[0], "output_len")):
        assert not [name for name, field in kind.__pydantic_fields__.items() if not field.description]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind, key, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foo": 1}, "unknown key 'foo'"),
        ({"cases": [CASE | {"foo": 1}]}, "unknown key 'cases.0.foo'"),
        ({"cases": []}, "cases: Tuple should have at least 1 item"),
        ({"rounds": "3"}, "rounds: Input should be a valid integer, got '3'"),
        ({"replicas": 0}, "replicas: Input should be greater than or equal to 1, got 0"),
        ({"mode": "batch"}, "mode: Input should be 'offline' or 'online', got 'batch'"),
        ({"mode": "online"}, r"cases\[0\].request_rate is required with mode online, got None"),
        ({"cases": [CASE | {"request_rate": 2}]}, r"cases\[0\].request_rate is not allowed with mode offline, got 2"),
        ({"tensor_parallel_size": 2}, "vLLM refuses Ray's executor"),
        ({"dataset": "sharegpt", "cases": [{"num_requests": 1}]}, "dataset sharegpt needs a dataset_path, got None"),
        ({"dataset_path": "a.json"}, "dataset random takes no dataset_path"),
        ({"cases": [{"num_requests": 1}]}, "dataset random needs input_len and output_len"),
        ({"cases": [CASE, CASE]}, "cases repeats an entry"),
        ({"kv_cache_dtypes": ["auto", "auto"]}, "kv_cache_dtypes repeats an entry: \\['auto', 'auto'\\]"),
        (
            {"kv_cache_dtypes": ["auto", "int8_costum"]},
            "yaml: kv_cache_dtypes: expected some of auto, .* 'int8_costum'$",
        ),
        (
            {"kv_cache_dtypes": ["auto", K6V4 + "2"]},
            f"kv_cache_dtypes {K6V4}2: format must be one of k8v8, .* 'k6v42'$",
        ),
        ({"kv_cache_dtypes": [8]}, "kv_cache_dtypes must be strings like int8_custom:format=k6v4, got 8"),
        ({"kv_cache_dtypes": ["fp8:model=x"]}, "fp8:model=x: model cannot be set here; set it with the key 'model'"),
        ({"kv_cache_dtypes": ["int8_custom:layer_policy=a.yaml"]}, r"layer_policy=a.yaml: .*/a.yaml cannot be read"),
        (
            {"kv_cache_dtypes": [K6V4], "engine_args": {"additional_config": {"int8_kv": {"format": "k8v8"}}}},
            f"yaml: {K6V4} sets format, and .* sets it to 'k8v8': leave out one of the two",
        ),
        ({"engine_args": {"model": "x"}}, "engine_args has 'model'; set it with the key 'model'"),
        ({"kv_cache_seqs": 1, "engine_args": {"kv_cache_memory_bytes": 1}}, "both set the KV memory"),
        ({"goodput_ms": {"ttft": 100}}, "goodput_ms needs mode online"),
        ({"kv_cache_dtypes": ["auto:kv_store=k9v9"]}, "k9v9"),
        ({"kv_store_path": "a"}, "kv_store_path is for caches with :kv_store=CODEC, of which kv_cache_dtypes has none"),
        (
            {"kv_cache_dtypes": ["auto:kv_store=exact"], "engine_args": {"kv_transfer_config": {}}},
            "engine_args has 'kv_transfer_config', which :kv_store=CODEC of a cache sets; leave out one",
        ),
        ({"goodput_ms": {"tft": 100}}, "goodput_ms.tft.* Input should be 'ttft', 'tpot' or 'e2el'"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **changes)


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"a\.yaml: must be a mapping of keys, got list"):
        bench_config.load(tmp_path / "a.yaml")


def test_a_dataset_lies_beside_its_configuration(tmp_path):
    config = load(tmp_path, dataset="custom", dataset_path="a.jsonl", cases=[{"num_requests": 1}])
    assert config.dataset_path == str(tmp_path / "a.jsonl")


def test_a_cache_is_a_dtype_with_options(tmp_path):
    config = load(tmp_path, kv_cache_dtypes=["auto", K6V4, "fp8:block_size=64"])
    assert config.kv_cache_dtypes == (
        CacheSpec("auto", "auto"),
        CacheSpec(K6V4, "int8_custom", int8_kv={"format": "k6v4"}),
        CacheSpec("fp8:block_size=64", "fp8", engine_options={"block_size": 64}),
    )
    assert dataclasses.replace(config, seed=1).kv_cache_dtypes == config.kv_cache_dtypes


def test_engines_of_a_cache_share_a_store(tmp_path):
    names = ["auto", K6V4, f"{K6V4}:kv_store=bound:0.2"]
    config = dataclasses.replace(load(tmp_path, kv_cache_dtypes=names), kv_store_path="folder")
    assert [cache.name for cache in config.kv_cache_dtypes] == names
    without, with_store = (replica.engine_args(config, "model", cache) for cache in config.kv_cache_dtypes[1:])
    assert with_store.pop("kv_transfer_config") == {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "vllm_int8kv.store",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"codec": "bound:0.2", "path": "folder"},
    }
    assert with_store == without


def test_a_layer_policy_lies_beside_its_configuration_and_is_part_of_it(tmp_path):
    """The name stays as it is written, without the folders of a machine; a sweep does not go on with another policy."""
    name, policy = "int8_custom:layer_policy=policies/a.yaml", tmp_path / "policies" / "a.yaml"
    policy.parent.mkdir()
    policy.write_text("{0: auto}")
    before = load(tmp_path, kv_cache_dtypes=["auto", name])
    assert before.kv_cache_dtypes[1] == CacheSpec(name, "int8_custom", int8_kv={"layer_policy": {0: "auto"}})
    policy.write_text("{0: k4v4}")
    after = load(tmp_path, kv_cache_dtypes=["auto", name])
    assert after.kv_cache_dtypes[1].int8_kv == {"layer_policy": {0: "k4v4"}}
    assert sweep.sha256(before) != sweep.sha256(after)


@pytest.mark.parametrize("path", SERVE, ids=lambda path: path.stem)
def test_serve_configurations_are_options_of_vllm(path):
    """A key that vLLM does not know ends the parser."""
    _, options = serve.parse(["--config", str(path)])
    assert options.kv_cache_dtype == "int8_custom"
    assert options.model == yaml.safe_load(path.read_text())["model"]


@pytest.mark.parametrize(
    ("dataset", "changes", "lengths"),
    [
        ("random", {}, {64}),
        ("random", {"cases": [CASE | {"prefix_len": 32}]}, {96}),
        ("prefix_repetition", {"num_prefixes": 2, "cases": [CASE | {"prefix_len": 32}]}, {96}),
        ("custom", {"dataset_path": "a.jsonl", "cases": [{"num_requests": 2, "output_len": 5}]}, {1, 3}),
        ("sharegpt", {"dataset_path": "a.json", "cases": [{"num_requests": 2}]}, {8, 10}),
    ],
)
def test_requests_come_from_vllms_datasets(tmp_path, dataset, changes, lengths):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n{"prompt": "one two three"}\n')
    turns = [[" a" * 8, " b" * 6], [" a" * 10, " b" * 4]]
    talks = [{"conversations": [{"value": text} for text in turn]} for turn in turns]
    (tmp_path / "a.json").write_text(json.dumps(talks))
    config = load(tmp_path, dataset=dataset, **changes)
    tokenizer = workload.load_tokenizer(str(models.smollm2()))
    requests = workload.sample(config, config.cases[0], tokenizer, seed=1)
    assert {len(request.prompt_token_ids) for request in requests} == lengths
    assert len({tuple(request.prompt_token_ids) for request in requests}) == config.cases[0].num_requests
    assert requests == workload.sample(config, config.cases[0], tokenizer, seed=1)
    wanted = {4, 6} if dataset == "sharegpt" else {config.cases[0].output_len}
    assert {request.output_len for request in requests} == wanted


def test_a_file_with_too_few_requests_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n')
    changes = {"dataset": "custom", "dataset_path": "a.jsonl", "cases": [{"num_requests": 2, "output_len": 5}]}
    config = load(tmp_path, **changes)
    tokenizer = workload.load_tokenizer(str(models.smollm2()))
    with pytest.raises(ValueError, match="dataset custom has 1 usable requests, expected 2"):
        workload.sample(config, config.cases[0], tokenizer, seed=0)

"""How a KV cache is spelled, and what vLLM is told of it."""

import re
from importlib import metadata

import pytest

from vllm_int8kv.evaluation.cache_spec import CacheSpec

K6V4 = "int8_custom:format=k6v4"


def test_a_cache_is_a_dtype_with_options():
    spec = CacheSpec.parse("int8_custom:rotate_keys=false:format=k6v4", "--dtypes")
    assert (spec.kv_cache_dtype, spec.int8_kv) == ("int8_custom", {"rotate_keys": False, "format": "k6v4"})
    assert CacheSpec.parse("fp8_e5m2", "--dtypes") == CacheSpec("fp8_e5m2", "fp8_e5m2")
    assert CacheSpec.parse("fp8:block_size=64", "--dtypes").engine_options == {"block_size": 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8_costum", "kv_cache_dtypes: expected some of auto, "),
        ("int8_custom:k6v4", "kv_cache_dtypes int8_custom:k6v4: expected OPTION=VALUE after int8_custom:, got 'k6v4'"),
        ("int8_custom:format=k9v4", "kv_cache_dtypes int8_custom:format=k9v4: format must be one of k8v8, "),
        ("int8_custom:format=8", "kv_cache_dtypes int8_custom:format=8: additional_config"),
        ("int8_custom:layer_policy=a.yaml", "kv_cache_dtypes int8_custom:layer_policy=a.yaml: additional_config"),
        ("fp8:foo=1", "kv_cache_dtypes fp8:foo=1: vLLM's LLM has no argument 'foo'"),
        ("fp8:block_size=64", "kv_cache_dtypes fp8:block_size=64: block_size cannot be set here; use engine_args"),
    ],
)
def test_an_error_says_where_the_cache_was_named(text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CacheSpec.parse(text, "kv_cache_dtypes", reserved={"block_size": "use engine_args"})


def test_a_layer_policy_is_read_when_it_is_named(tmp_path, monkeypatch):
    policy = tmp_path / "policy.yaml"
    policy.write_text("{0: auto, 200: int8}")  # the model, and how many layers it has, is not known yet
    found = {"layer_policy": {0: "auto", 200: "k8v8"}}
    assert CacheSpec.parse(f"int8_custom:layer_policy={policy}", "--dtypes").int8_kv == found
    relative = "int8_custom:layer_policy=policy.yaml"
    assert CacheSpec.parse(relative, "--dtypes", folder=tmp_path) == CacheSpec(relative, "int8_custom", found)
    monkeypatch.chdir(tmp_path)
    assert CacheSpec.parse(relative, "--dtypes").int8_kv == found
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = CacheSpec.parse("int8_custom:layer_policy=~/policy.yaml", "--dtypes", folder=tmp_path / "configs")
    assert at_home.int8_kv == found
    policy.write_text("{0: fp8}")
    with pytest.raises(ValueError, match=r"^--dtypes int8_custom:.*policy\.yaml gives layer 0 the format 'fp8'"):
        CacheSpec.parse(relative, "--dtypes")


def test_a_dtype_of_another_plugin_is_left_to_the_engine(monkeypatch):
    theirs = metadata.EntryPoint("theirs", "their_cache:register", "vllm.general_plugins")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [theirs])
    assert CacheSpec.parse("their_dtype", "--dtypes").kv_cache_dtype == "their_dtype"


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("auto", {"kv_cache_dtype": "auto"}),
        ("fp8:block_size=64", {"kv_cache_dtype": "fp8", "block_size": 64}),
        ("int8_custom", {"kv_cache_dtype": "int8_custom"}),
        (K6V4, {"kv_cache_dtype": "int8_custom", "additional_config": {"int8_kv": {"format": "k6v4"}}}),
    ],
)
def test_arguments_of_a_cache(text, arguments):
    assert CacheSpec.parse(text, "--dtypes").llm_arguments() == arguments


def test_options_of_a_cache_stand_beside_others():
    others = {"another": 1, "int8_kv": {"rotate_keys": False}}
    found = CacheSpec.parse(K6V4, "--dtypes").llm_arguments(others)
    assert found["additional_config"] == {"another": 1, "int8_kv": {"rotate_keys": False, "format": "k6v4"}}
    assert others == {"another": 1, "int8_kv": {"rotate_keys": False}}, "not changed in place"
    assert CacheSpec.parse("auto", "--dtypes").llm_arguments({"another": 1})["additional_config"] == {"another": 1}
    same = {"int8_kv": {"format": "k6v4"}}
    assert CacheSpec.parse(K6V4, "--dtypes").llm_arguments(same)["additional_config"] == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "k8v8"},
            f"{K6V4} sets format, and additional_config[\"int8_kv\"] sets it to 'k8v8': leave out one",
        ),
        ({"fromat": "k8v8"}, "additional_config[\"int8_kv\"] has no option 'fromat'"),
        ("k6v4", "additional_config[\"int8_kv\"] must be a mapping of options, got 'k6v4'"),
    ],
)
def test_options_of_a_cache_may_not_contradict_others(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        CacheSpec.parse(K6V4, "--dtypes").llm_arguments({"int8_kv": options})


def test_other_options_must_be_a_mapping():
    with pytest.raises(ValueError, match=r"^additional_config must be a mapping, got \['int8_kv'\]$"):
        CacheSpec.parse(K6V4, "--dtypes").llm_arguments(["int8_kv"])

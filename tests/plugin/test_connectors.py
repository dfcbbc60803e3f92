"""KV connectors: which class vLLM would load decides, and pages of another meaning are not found."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import engines
import pytest
import tiny_models

import vllm_int8kv
from vllm_int8kv.serving.start_up import connectors

PLANES = "the bytes of a slot lie in several planes of its block"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    vllm_int8kv.register()
    return tiny_models.llama(tmp_path_factory.mktemp("llama"))


def create_config(model: Path, connector: dict | None, **options):
    options = dict(enable_chunked_prefill=False, max_num_batched_tokens=2048) | options
    transfer = None if connector is None else {"kv_role": "kv_both"} | connector
    return engines.create_config(model, kv_transfer_config=transfer, **options)


@pytest.fixture
def foreign(monkeypatch) -> str:
    """A module whose connectors have the names of vLLM's."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import example_connector, multi_connector

    module = ModuleType("foreign_connectors")
    for base in (example_connector.ExampleConnector, multi_connector.MultiConnector):
        setattr(module, base.__name__, type(base.__name__, (base,), {"__module__": module.__name__}))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


@pytest.mark.parametrize("name", ["ExampleConnector", "MultiConnector"])
def test_a_name_of_vllm_in_another_module_is_another_connector(name, foreign, llama):
    connector = {"kv_connector": name, "kv_connector_module_path": foreign}
    with pytest.raises(ValueError, match=rf"kv_connector='{name}' \(foreign_connectors:{name}\): {PLANES}"):
        create_config(llama, connector)
    inside = {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": [connector]}}
    with pytest.raises(ValueError, match=PLANES):
        create_config(llama, inside)


def test_the_same_class_under_its_own_path_is_known(llama, tmp_path):
    path, _, name = connectors.EXAMPLE.partition(":")
    connector = {"kv_connector": name, "kv_connector_module_path": path}
    create_config(llama, connector | {"kv_connector_extra_config": {"shared_storage_path": str(tmp_path)}})


@pytest.mark.parametrize(
    ("children", "message"),
    [
        ([{}], 'kv_transfer_config, "connectors", entry 0: expected a mapping with the key "kv_connector", got {}'),
        (["ExampleConnector"], "got 'ExampleConnector'"),
        ([{"kv_connector": 3}], "got {'kv_connector': 3}"),
        ("ExampleConnector", "\"connectors\" must be a list, got 'ExampleConnector'"),
        (
            [{"kv_connector": "ExampleConnector", "kv_connector_extra_config": []}, {"kv_role": "kv_both"}],
            'entry 1: expected a mapping with the key "kv_connector"',
        ),
        (
            [{"kv_connector": "ExampleConnector", "kv_connector_extra_config": [1]}],
            "kv_connector_extra_config must be a mapping, got [1]",
        ),
        ([{"kv_connector": "NoSuchConnector"}], "kv_connector='NoSuchConnector' cannot be loaded: Unsupported"),
        (
            [{"kv_connector": "X", "kv_connector_module_path": "no.such.module"}],
            "kv_connector='X' cannot be loaded: No module named 'no'",
        ),
    ],
)
def test_malformed_entries_get_words(children, message, llama):
    extra = {"connectors": children}
    given = SimpleNamespace(
        kv_connector="MultiConnector", kv_connector_module_path=None, kv_connector_extra_config=extra
    )
    config = create_config(llama, None)
    config.kv_transfer_config = given
    assert any(message in reason for reason in connectors.connector_reasons(config)), [
        *connectors.connector_reasons(config)
    ]


def folder_of(config) -> str:
    return config.kv_transfer_config.kv_connector_extra_config["shared_storage_path"]


def test_engines_share_a_folder_only_if_their_pages_mean_the_same(llama, tmp_path):
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    expected = folder_of(create_config(llama, connector))
    assert Path(expected).parent == tmp_path and Path(expected).name.startswith(connectors.FOLDER_PREFIX)
    for same in ({}, {"max_model_len": 128}, {"additional_config": {"int8_kv": {"equalize_keys": False}}}):
        assert folder_of(create_config(llama, connector, **same)) == expected  # no keys are equalized here
    other = tiny_models.llama(tmp_path / "other")
    folders = {
        expected,
        folder_of(create_config(other, connector)),
        *(
            folder_of(create_config(llama, connector, **options))
            for options in (
                {"block_size": 64},
                {"dtype": "float16"},
                {"kv_cache_dtype_skip_layers": ["1"]},
                {"additional_config": {"int8_kv": {"rotate_keys": False}}},
                {"additional_config": {"int8_kv": {"layer_policy": {2: "auto"}}}},
            )
        ),
    }
    assert len(folders) == 7


def test_a_folder_gets_its_name_once(llama, tmp_path):
    """vLLM checks a configuration again whenever it derives another one from it."""
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    config = create_config(llama, connector)
    before = folder_of(config)
    connectors.separate_folders(config, {})
    assert folder_of(config) == before


def test_every_folder_of_a_multi_connector_is_apart(llama, tmp_path):
    tier = {"type": "fs", "root_dir": str(tmp_path / "tier")}
    children = [
        {"kv_connector": "ExampleConnector", "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "a")}},
        {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"secondary_tiers": [tier]}},
        {"kv_connector": "SimpleCPUOffloadConnector"},
    ]
    children = [child | {"kv_role": "kv_both"} for child in children]
    config = create_config(llama, None)
    config.kv_transfer_config = SimpleNamespace(
        kv_connector="MultiConnector",
        kv_connector_module_path=None,
        kv_connector_extra_config={"connectors": children},
    )
    assert not [*connectors.connector_reasons(config)]
    connectors.separate_folders(config, {})
    example, offloading, _ = config.kv_transfer_config.kv_connector_extra_config["connectors"]
    name = Path(example["kv_connector_extra_config"]["shared_storage_path"])
    assert name.parent == tmp_path / "a" and name.name.startswith(connectors.FOLDER_PREFIX)
    (separated,) = offloading["kv_connector_extra_config"]["secondary_tiers"]
    assert separated == {"type": "fs", "root_dir": str(tmp_path / "tier" / name.name)}
    assert tier["root_dir"] == str(tmp_path / "tier")  # what the user gave stays


def test_what_the_user_gave_stays(llama, tmp_path):
    """One object for two engines with different formats, in a folder whose name looks like one of ours."""
    from vllm.config import KVTransferConfig

    path = tmp_path / "int8kv-cache"
    given = KVTransferConfig(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"shared_storage_path": str(path)},
    )
    folders = set()
    for name in ("k8v8", "k6v4"):
        config = create_config(llama, None, additional_config={"int8_kv": {"format": name}})
        config.kv_transfer_config = given
        connectors.separate_folders(config, {})
        folders.add(folder_of(config))
        assert Path(folder_of(config)).parent == path
    assert len(folders) == 2 and given.kv_connector_extra_config == {"shared_storage_path": str(path)}


def test_lmcache_by_another_option_is_refused(llama):
    with pytest.raises(ValueError, match="kv_offloading_backend='lmcache': use 'native'"):
        create_config(llama, None, kv_offloading_size=1, kv_offloading_backend="lmcache")


def test_a_foreign_offloading_spec_is_refused(llama):
    config = create_config(llama, None)
    extra = {"spec_name": "MySpec", "spec_module_path": "my.specs"}
    config.kv_transfer_config = SimpleNamespace(
        kv_connector="OffloadingConnector", kv_connector_module_path=None, kv_connector_extra_config=extra
    )
    (reason,) = connectors.connector_reasons(config)
    assert "spec_name='MySpec'" in reason


@pytest.mark.parametrize("tier", [{"type": "p2p"}, {"type": "fs", "module_path": "my.tiers"}, {"type": "obj"}])
def test_a_tier_without_an_identity_of_its_own_is_refused(tier, llama):
    extra = {"secondary_tiers": [tier]}
    config = create_config(llama, None)
    config.kv_transfer_config = SimpleNamespace(
        kv_connector="OffloadingConnector", kv_connector_module_path=None, kv_connector_extra_config=extra
    )
    (reason,) = connectors.connector_reasons(config)
    assert f"the secondary tier {tier['type']!r}" in reason

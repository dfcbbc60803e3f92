"""Layers know their cache format by name, and vLLM counts and allocates the pages of each.

A second format that no kernel has stands for those to come: eight bits for keys and four for values.
"""

from types import SimpleNamespace

import engines
import pytest
import tiny_models
import torch
import yaml

from vllm_int8kv.cache import formats
from vllm_int8kv.cache.formats import K8V8, CacheFormat
from vllm_int8kv.serving import layers, lifecycle
from vllm_int8kv.serving.backend import Int8KVBackend

DUMMY = CacheFormat("dummy", k_bits=8, v_bits=4)


@pytest.fixture
def dummy_format(monkeypatch) -> CacheFormat:
    monkeypatch.setitem(formats.FORMATS, DUMMY.name, DUMMY)
    return DUMMY


@pytest.fixture
def policy(tmp_path):
    """Writes a layer policy; returns the options that name it."""

    def write(layers: dict[int, str]) -> dict:
        path = tmp_path / "policy.yaml"
        path.write_text(yaml.safe_dump(layers))
        # The operators know no such format, so that the pass over random tokens could not run.
        return {"int8_kv": {"layer_policy": str(path), "equalize_keys": False}}

    return write


@pytest.mark.engine
def test_page_sizes_follow_the_format_of_each_layer(dummy_format, policy, tmp_path):
    model = tiny_models.llama(tmp_path / "llama")
    with engines.tiny_engine(model, additional_config=policy({1: dummy_format.name})) as llm:
        by_index = engines.layers(llm)
        assert {index: layer.impl.cache_format.name for index, layer in by_index.items()} == {
            0: "k8v8",
            1: "dummy",
            2: "k8v8",
        }
        config = llm.llm_engine.vllm_config.cache_config
        pages = {}
        for index, layer in by_index.items():
            num_blocks, num_kv_heads, block_size, num_bytes = layer.kv_cache.shape
            assert num_blocks == config.num_gpu_blocks and block_size == config.block_size
            pages[index] = num_kv_heads * block_size * num_bytes
        expected = {
            index: 2 * config.block_size * layer_format.content_bytes(64)
            for index, layer_format in enumerate((K8V8, dummy_format, K8V8))
        }
        assert pages == expected
        assert len(set(pages.values())) == 2
        # As many blocks as fit: vLLM counts a block of all layers together.
        assert config.num_gpu_blocks == engines.KV_CACHE_MEMORY // sum(pages.values())


@pytest.mark.engine
def test_an_operator_refuses_a_format_that_no_kernel_has(dummy_format, policy, tmp_path):
    model = tiny_models.llama(tmp_path / "llama")
    refused = pytest.raises(RuntimeError, match="cache_format 'dummy' does not exist; supported: k8v8")
    with engines.tiny_engine(model, additional_config=policy({1: dummy_format.name})) as llm, refused:
        engines.prompt_logprobs(llm)


@pytest.fixture
def config(policy):
    """The configuration of an engine with a policy for four layers."""
    return SimpleNamespace(additional_config=policy({0: "int8", 1: "dummy", 2: "auto"}))


def model_config(runner: str = "generate") -> SimpleNamespace:
    return SimpleNamespace(runner=runner, get_total_num_hidden_layers=lambda: 4)


def built_layer(index: int, owner: int | None = None) -> SimpleNamespace:
    """A layer that was just built, which may read the cache of another one."""
    target = None if owner is None else f"model.layers.{owner}.attn"
    layer = SimpleNamespace(layer_name=f"model.layers.{index}.attn", kv_sharing_target_layer_name=target)
    layer.attn_backend, layer.impl = Int8KVBackend, SimpleNamespace()
    layers.assign_format(layer)
    return layer


def test_a_policy_names_formats_and_a_reader_has_that_of_its_owner(dummy_format, config):
    with layers.building(config, model_config()):
        for layer, expected in ((built_layer(0), K8V8), (built_layer(1), DUMMY), (built_layer(3, owner=1), DUMMY)):
            assert layer.impl.cache_format == layer.attn_backend.cache_format == expected
    assert built_layer(1).impl.cache_format == K8V8  # of another model, built later


def test_a_policy_is_about_the_target(dummy_format, config):
    """A draft has layers of its own, with the same indices."""
    cache_config = SimpleNamespace(
        cache_dtype="int8_custom", kv_cache_dtype_skip_layers=["0", "2"], sliding_window=None
    )

    def settled(index: int) -> tuple[str, list[str]]:
        cache = layers.settle_cache_config(cache_config, f"model.layers.{index}.attn", None, None)
        return cache.cache_dtype, cache.kv_cache_dtype_skip_layers

    with layers.building(config, model_config("draft")):
        assert built_layer(1).impl.cache_format == K8V8
        assert settled(2) == ("int8_custom", [])
        assert settled(0) == ("auto", ["0"])  # an option of vLLM, which means drafts too
    with layers.building(config, model_config()):
        assert settled(2) == ("auto", ["2"])
        assert settled(1) == ("int8_custom", [])


def quantized(name: str, reads: str | None = None) -> SimpleNamespace:
    layer = SimpleNamespace(layer_name=name, kv_sharing_target_layer_name=reads, kv_cache_dtype="int8_custom")
    layer.impl = SimpleNamespace(cache_format=K8V8)
    return layer


def native(name: str, reads: str | None = None) -> SimpleNamespace:
    layer = SimpleNamespace(layer_name=name, kv_sharing_target_layer_name=reads, kv_cache_dtype="auto")
    layer.impl = SimpleNamespace()
    return layer


def test_skipped_layers_with_chunked_attention_have_the_native_backend(tmp_path):
    """vLLM chooses the backend of such a layer, as Llama-4 has them, before it looks at the list."""
    import vllm_int8kv

    vllm_int8kv.register()
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import ChunkedLocalAttention

    lifecycle.follow_layers()
    options = dict(skip_tokenizer_init=True, kv_cache_dtype="int8_custom", kv_cache_dtype_skip_layers=["1"])
    config = EngineArgs(model=str(tiny_models.llama(tmp_path)), **options).create_engine_config()
    with set_current_vllm_config(config):
        built = [
            ChunkedLocalAttention(4, 64, 0.125, 16, 2, cache_config=config.cache_config, prefix=f"layers.{index}.attn")
            for index in range(2)
        ]
    assert [layers.is_ours(layer) for layer in built] == [True, False]
    for layer, dtype in zip(built, (torch.int8, config.model_config.dtype), strict=True):
        assert layer.get_kv_cache_spec(config).dtype == dtype
    # What the other layers are told is not what this one was.
    assert config.cache_config.kv_cache_dtype_skip_layers == ["1"]


def test_a_draft_that_is_told_late_whose_cache_it_reads():
    """As the drafts of Gemma-4: nothing may read bytes that it does not understand."""
    owner, reader = quantized("owner"), quantized("reader", reads="owner")
    owner.impl.cache_format = DUMMY
    layers.check_shared_caches({"owner": owner, "reader": reader})
    assert reader.impl.cache_format == DUMMY
    layers.check_shared_caches({"owner": native("owner"), "reader": native("reader", reads="owner")})
    for owner, reader in ((quantized, native), (native, quantized)):
        pair = {"owner": owner("owner"), "reader": reader("reader", reads="owner")}
        with pytest.raises(ValueError, match="reader reads the KV cache of owner, but its KV cache dtype is"):
            layers.check_shared_caches(pair)


def test_a_backend_that_vllm_has_wrapped_stays_what_it_is():
    """As vLLM does for chunked attention: its subclass brings a metadata builder of its own."""
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    wrapped = create_chunked_local_attention_backend(Int8KVBackend, 8192)
    for cache_format in (K8V8, DUMMY):
        backend = wrapped.of_format(cache_format)
        assert backend.get_builder_cls() is wrapped.get_builder_cls() is not Int8KVBackend.get_builder_cls()
        assert backend.cache_format == cache_format


def test_backends_of_formats_differ_in_their_pages_and_in_nothing_else():
    backend = Int8KVBackend.of_format(DUMMY)
    assert backend is Int8KVBackend.of_format(DUMMY) and Int8KVBackend.of_format(K8V8) is Int8KVBackend
    assert backend.full_cls_name() != Int8KVBackend.full_cls_name()  # vLLM groups layers by it
    assert backend.get_name() == Int8KVBackend.get_name()
    assert backend.get_impl_cls() is Int8KVBackend.get_impl_cls()
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.int8)
    assert backend.customize_spec(spec).state_content_bytes == 64 + 32 + 4

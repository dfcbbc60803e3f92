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
from vllm_int8kv.serving.backend import Int8KVBackend
from vllm_int8kv.serving.layers import assign_format

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


def test_a_policy_may_name_formats(dummy_format, policy, tmp_path):
    from vllm_int8kv.serving.layers import formats_of_policy

    config = SimpleNamespace(
        additional_config=policy({0: "int8", 1: "dummy", 2: "auto"}),
        model_config=SimpleNamespace(get_total_num_hidden_layers=lambda: 4),
    )
    assert formats_of_policy(config) == {0: K8V8, 1: DUMMY}


def test_a_layer_that_reads_another_ones_cache_has_its_format():
    layer = SimpleNamespace(
        layer_name="model.layers.2.attn",
        kv_sharing_target_layer_name="model.layers.1.attn",
        attn_backend=Int8KVBackend,
        impl=SimpleNamespace(),
    )
    assign_format(layer, {1: DUMMY})
    assert layer.impl.cache_format == DUMMY
    assert layer.attn_backend.cache_format == DUMMY


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

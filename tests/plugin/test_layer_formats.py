"""Layers know their cache format by name, and vLLM counts and allocates the pages of each."""

from types import SimpleNamespace

import engines
import pytest
import tiny_models
import torch
import yaml

from vllm_int8kv.cache.formats import FORMATS, K8V8
from vllm_int8kv.serving import layers, lifecycle
from vllm_int8kv.serving.backend import Int8KVBackend

K8V4, K6V4 = FORMATS["k8v4"], FORMATS["k6v4"]


@pytest.fixture
def policy(tmp_path):
    """Writes a layer policy; returns the options that name it."""

    def write(layers: dict) -> dict:
        path = tmp_path / "policy.yaml"
        path.write_text(yaml.safe_dump(layers))
        return {"int8_kv": {"layer_policy": str(path), "format": "k6v4"}}

    return write


@pytest.mark.engine
def test_page_sizes_follow_the_format_of_each_layer(policy, tmp_path):
    model = tiny_models.llama(tmp_path / "llama")
    mixed = policy({1: {"nbits_key": 8, "nbits_value": 4}, 2: "int8"})
    with engines.tiny_engine(model, additional_config=mixed) as llm:
        by_index = engines.layers(llm)
        names = {index: layer.impl.cache_format.name for index, layer in by_index.items()}
        assert names == {0: "k6v4", 1: "k8v4", 2: "k8v8"}
        config = llm.llm_engine.vllm_config.cache_config
        pages = {}
        for index, layer in by_index.items():
            num_blocks, num_kv_heads, block_size, num_bytes = layer.kv_cache.shape
            assert num_blocks == config.num_gpu_blocks and block_size == config.block_size
            pages[index] = num_kv_heads * block_size * num_bytes
        expected = {
            index: 2 * config.block_size * layer_format.content_bytes(64)
            for index, layer_format in enumerate((K6V4, K8V4, K8V8))
        }
        assert pages == expected
        assert len(set(pages.values())) == 3
        # As many blocks as fit: vLLM counts a block of all layers together.
        assert config.num_gpu_blocks == engines.KV_CACHE_MEMORY // sum(pages.values())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "k6v3"}, '["format"] must be one of k8v8, k8v6, k8v5, k8v4, k8v2, k6v8,'),
        ({"format": "int8"}, "got 'int8'"),
        ({"format": 4}, '["format"] must be str, got 4 (int)'),
        ({"layer_policy": {0: "k3v4"}}, "gives layer 0 the format 'k3v4'; use int8 or auto, or a format: k8v8, k8v6"),
        (
            {"layer_policy": {0: {"nbits_key": 3, "nbits_value": 4}}},
            "gives layer 0 the format {'nbits_key': 3, 'nbits_value': 4}",
        ),
        ({"layer_policy": {0: {"nbits_key": 4}}}, "gives layer 0 the format {'nbits_key': 4}"),
    ],
)
def test_formats_that_do_not_exist_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        engines.create_config(tiny_models.llama(tmp_path), additional_config={"int8_kv": given})
    assert message in str(caught.value)


def test_formats_without_cuda_kernels_are_refused_on_a_gpu(tmp_path, monkeypatch):
    """Below 8 bits for large heads. What is supported there passes this check, and fails at the next."""
    from vllm.platforms import current_platform

    from vllm_int8kv.serving.start_up import checks

    def check(head_size: int, chosen: str) -> str:
        model = tiny_models.llama(tmp_path / f"{head_size}_{chosen}", head_size=head_size)
        config = engines.create_config(model, additional_config={"int8_kv": {"layer_policy": {1: chosen}}})
        with monkeypatch.context() as patch, pytest.raises(ValueError) as caught:
            patch.setattr(type(current_platform), "is_cpu", lambda self: False)
            checks.check_engine(config, None)
        return str(caught.value)

    refused = (
        "the cache formats k6v4 with head_size 192 on a GPU, where they have kernels for head sizes up to 128; use k8"
    )
    assert refused in check(192, "k6v4")
    for head_size, chosen in ((128, "k6v4"), (192, "k8v8")):
        assert "platform" in (message := check(head_size, chosen)) and "cache formats" not in message


def test_a_layer_whose_format_has_no_cuda_kernels_is_refused_on_a_gpu(config, monkeypatch):
    """The head sizes of single layers are known when they are built."""
    monkeypatch.setattr(type(layers.current_platform), "is_cuda", lambda self: True)
    with layers.building(config, model_config()):
        assert built_layer(1, head_size=128).impl.cache_format == K8V4
        assert built_layer(0, head_size=256).impl.cache_format == K8V8
        expected = (
            "model.layers.1.attn has head_size 256, but the CUDA kernels of the cache format k8v4 have head sizes"
        )
        with pytest.raises(ValueError, match=expected):
            built_layer(1, head_size=256)


@pytest.fixture
def config(policy):
    """The configuration of an engine with a policy for four layers."""
    return SimpleNamespace(additional_config=policy({0: "int8", 1: "k8v4", 2: "auto"}))


def model_config(runner: str = "generate") -> SimpleNamespace:
    return SimpleNamespace(runner=runner, get_total_num_hidden_layers=lambda: 4)


def built_layer(index: int, owner: int | None = None, head_size: int = 64) -> SimpleNamespace:
    """A layer that was just built, which may read the cache of another one."""
    target = None if owner is None else f"model.layers.{owner}.attn"
    layer = SimpleNamespace(layer_name=f"model.layers.{index}.attn", kv_sharing_target_layer_name=target)
    layer.attn_backend, layer.impl = Int8KVBackend, SimpleNamespace(head_size=head_size)
    layers.assign_format(layer)
    return layer


def test_a_policy_names_formats_and_a_reader_has_that_of_its_owner(config):
    with layers.building(config, model_config()):
        of_policy = ((built_layer(0), K8V8), (built_layer(1), K8V4), (built_layer(3, owner=1), K8V4))
        for layer, expected in (*of_policy, (built_layer(3), K6V4)):
            assert layer.impl.cache_format == layer.attn_backend.cache_format == expected
    assert built_layer(1).impl.cache_format == K8V8  # of another model, built later


def test_a_policy_is_about_the_target(config):
    """A draft has layers of its own, with the same indices."""
    cache_config = SimpleNamespace(
        cache_dtype="int8_custom", kv_cache_dtype_skip_layers=["0", "2"], sliding_window=None
    )

    def settled(index: int) -> tuple[str, list[str]]:
        cache = layers.settle_cache_config(cache_config, f"model.layers.{index}.attn", None, None)
        return cache.cache_dtype, cache.kv_cache_dtype_skip_layers

    with layers.building(config, model_config("draft")):
        assert built_layer(1).impl.cache_format == K6V4  # the format that all layers have
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
    owner.impl.cache_format = K8V4
    layers.check_shared_caches({"owner": owner, "reader": reader})
    assert reader.impl.cache_format == K8V4
    layers.check_shared_caches({"owner": native("owner"), "reader": native("reader", reads="owner")})
    for owner, reader in ((quantized, native), (native, quantized)):
        pair = {"owner": owner("owner"), "reader": reader("reader", reads="owner")}
        with pytest.raises(ValueError, match="reader reads the KV cache of owner, but its KV cache dtype is"):
            layers.check_shared_caches(pair)


def test_a_backend_that_vllm_has_wrapped_stays_what_it_is():
    """As vLLM does for chunked attention: its subclass brings a metadata builder of its own."""
    from vllm.model_executor.layers.attention.chunked_local_attention import create_chunked_local_attention_backend

    wrapped = create_chunked_local_attention_backend(Int8KVBackend, 8192)
    for cache_format in (K8V8, K8V4):
        backend = wrapped.of_format(cache_format)
        assert backend.get_builder_cls() is wrapped.get_builder_cls() is not Int8KVBackend.get_builder_cls()
        assert backend.cache_format == cache_format


def test_backends_of_formats_differ_in_their_pages_and_in_nothing_else():
    backend = Int8KVBackend.of_format(K8V4)
    assert backend is Int8KVBackend.of_format(K8V4) and Int8KVBackend.of_format(K8V8) is Int8KVBackend
    assert backend.full_cls_name() != Int8KVBackend.full_cls_name()  # vLLM groups layers by it
    assert backend.get_name() == Int8KVBackend.get_name()
    assert backend.get_impl_cls() is Int8KVBackend.get_impl_cls()
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.int8)
    assert backend.customize_spec(spec).state_content_bytes == 64 + 32 + 2 + 4

"""Key equalization inside vLLM: outliers moved into the keys of a model change nothing, and who does without says so.

The stressed model differs from the clean one by factors of 128 in the keys of two layers.
"""

from types import SimpleNamespace

import engines
import pytest
import tiny_models
import torch
from support import supports

from benchmarks.accuracy import stress_model
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.serving import attention, calibration

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny Llama, and the same with outliers in the keys of two layers."""
    clean = tiny_models.llama(tmp_path_factory.mktemp("clean"))
    stressed = tmp_path_factory.mktemp("stressed") / "model"
    return clean, stress_model.make_stress_model(clean, stressed, 128, layers=(0, 2), pairs=(3, 20))


def run(model, **options):
    with engines.tiny_engine(model, **options) as llm:
        impls = [layer.impl for layer in engines.layers(llm).values()]
        equalizers = [impl.key_transform.equalizer for impl in impls if hasattr(impl, "key_transform")]
        return engines.prompt_logprobs(llm), equalizers


def test_outliers_in_keys_change_no_bit(models):
    clean, stressed = models
    expected, _ = run(clean, kv_cache_dtype="auto")
    stressed_auto, _ = run(stressed, kv_cache_dtype="auto")
    assert torch.equal(stressed_auto, expected)  # or the stress model is none
    ours, factors = run(clean)
    stressed_ours, stressed_factors = run(stressed)
    assert torch.equal(stressed_ours, ours)
    for layer, (before, after) in enumerate(zip(factors, stressed_factors, strict=True)):
        ratios = (after / before)[0]
        outliers = [3, 20, 35, 52] if layer != 1 else []
        assert ratios.nonzero().flatten().tolist() == list(range(64))
        assert (ratios == 128).nonzero().flatten().tolist() == outliers and ((ratios == 1) | (ratios == 128)).all()
    plain = {"int8_kv": {"equalize_keys": False}}
    without, none = run(stressed, additional_config=plain)
    assert none == [None] * 3
    kl = engines.kl_per_token(expected, ours)
    assert kl < engines.MAX_KL
    assert engines.kl_per_token(expected, without) > 5 * kl


def test_the_log_has_the_count_and_the_extremes(models, monkeypatch):
    log, details = [], []
    monkeypatch.setattr(calibration.logger, "info", lambda message, *args: log.append(message % args))
    monkeypatch.setattr(calibration.logger, "debug", lambda message, *args: details.append(message % args))
    run(models[1])
    (line,) = log
    assert "channels of keys equalized in 3 layer(s) of LlamaForCausalLM" in line
    assert line.count("model.layers.") == 1  # the layer with the largest factor
    assert [f"model.layers.{layer}.self_attn" in text for layer, text in enumerate(details)] == [True] * 3


def test_factors_depend_on_the_model_alone(models):
    """Not on how long its requests may be, nor on how many tokens fit into a step."""
    _, expected = run(models[1])
    for lengths in ({"max_model_len": 64, "max_num_batched_tokens": 64}, {"max_model_len": 512}):
        with engines.engine(models[1], skip_tokenizer_init=True, dtype="bfloat16", **lengths) as llm:
            for index, layer in engines.layers(llm).items():
                assert torch.equal(layer.impl.key_transform.equalizer, expected[index])


def test_a_model_that_cannot_run_is_served_without(models, monkeypatch):
    log = []
    monkeypatch.setattr(calibration.logger, "warning", lambda message, *args: log.append(message % args))

    def fail(query, key):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(attention, "key_equalizer", fail)
    expected, _ = run(models[0], kv_cache_dtype="auto")
    got, equalizers = run(models[0])
    assert equalizers == [None] * 3
    assert engines.kl_per_token(expected, got) < engines.MAX_KL
    assert log == [
        "INT8 KV cache: keys of LlamaForCausalLM are not equalized: its pass over random tokens failed "
        "(RuntimeError: no such layer)"
    ]


@supports("models of the Transformers backend", "equalized: KL to vLLM's own cache, with outliers in the keys")
def test_the_transformers_backend_is_equalized(models):
    """Its attention layers are registered in a tree of modules that is built already."""
    clean, stressed = models
    expected, _ = run(clean, kv_cache_dtype="auto")
    # In a process of its own, because it changes the classes of Transformers.
    with engines.tiny_engine(stressed, own_process=True, model_impl="transformers") as llm:
        assert engines.kl_per_token(expected, engines.prompt_logprobs(llm)) < engines.MAX_KL


class Draft(torch.nn.Module):
    def forward(self, input_ids, positions, hidden_states):
        """As the drafts of speculative decoding."""


class Encoder(torch.nn.Module):
    def forward(self, pixels):
        """No tokens."""


@pytest.mark.parametrize(
    ("model", "stages", "connector", "problem"),
    [
        (Draft(), 1, None, "its forward asks for hidden_states"),
        (Encoder(), 1, None, "its forward does not take input_ids and positions"),
        (Draft(), 2, None, "a stage of a pipeline cannot run by itself"),
        (Draft(), 1, "any", "a KV connector moves the cache between engines, whose factors may differ"),
    ],
)
def test_why_a_model_is_not_run(model, stages, connector, problem):
    parallel_config = SimpleNamespace(pipeline_parallel_size=stages)
    transfer = None if connector is None else SimpleNamespace(kv_connector=connector, kv_connector_module_path=None)
    config = SimpleNamespace(parallel_config=parallel_config, kv_transfer_config=transfer)
    assert calibration._why_not(model, config) == problem


def test_a_layer_that_reads_another_ones_cache_uses_its_factors(monkeypatch):
    """As Gemma-3n and the drafts of Gemma-4 do: Q must be multiplied by what K was divided by."""
    owner = SimpleNamespace(impl=SimpleNamespace(key_transform=KeyTransform(equalizer=torch.full((1, 32), 4.0))))
    context = SimpleNamespace(no_compile_layers={"owner": owner})
    monkeypatch.setattr(attention, "get_forward_context", lambda: context)
    used = []
    monkeypatch.setattr(attention.ops, "paged_attention", lambda *args, key_transform, **_: used.append(key_transform))
    impl = object.__new__(attention.Int8KVImpl)
    vars(impl).update(scale=1.0, sliding_window=None, logits_soft_cap=0.0, alibi_slopes=None, sinks=None)
    vars(impl).update(cpu_isa=None, cache_format=K8V8, key_transform=KeyTransform(equalizer=torch.ones(1, 32)))
    metadata = impl.metadata_of_one_sequence(1, 1, torch.device("cpu"))
    x = torch.zeros(1, 1, 32)
    for target, expected in ((None, impl.key_transform), ("owner", owner.impl.key_transform)):
        layer = SimpleNamespace(kv_sharing_target_layer_name=target)
        impl.forward(layer, x, x, x, None, metadata, x)
        assert used.pop() is expected

"""What the engine of `tune` measures is what serving would do: exact attention without a cache, and the operators."""

from types import SimpleNamespace

import engines
import pytest
import tiny_models
import torch

from vllm_int8kv.cache import reference
from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.evaluation.scoring import KL, LOG_PROB
from vllm_int8kv.evaluation.tuning.schemes import Scheme

MODELS = ("llama", "gemma2", "gpt_oss", "bloom", "qwen3", "gemma3n")
"""Windows, soft caps, sinks, ALiBi, norms of Q and K, and layers that read the cache of another."""
PAIRS = ("k8v8", "k6v4", "k2v2")

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=MODELS)
def measured(request, tmp_path_factory):
    """A `Tuner` on two random texts, and what vLLM's own prefill with its own cache expects after their tokens."""
    from vllm import SamplingParams

    from vllm_int8kv.evaluation.engines.tuning_engine import Tuner

    folder = getattr(tiny_models, request.param)(tmp_path_factory.mktemp(request.param))
    torch.manual_seed(0)
    token_ids = [torch.randint(3, tiny_models.VOCAB_SIZE, (n,)).tolist() for n in (90, 47)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    with engines.tiny_exact_engine(folder, kv_cache_dtype="auto", max_logprobs=-1) as llm:
        prompts = [{"prompt_token_ids": ids[: len(ids) // 2]} for ids in token_ids]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    rows = [
        [position[token].logprob for token in range(tiny_models.VOCAB_SIZE)]
        for output in outputs
        for position in output.prompt_logprobs[1:]
    ]
    with engines.tiny_exact_engine(folder) as llm:
        yield SimpleNamespace(tuner=Tuner(llm, token_ids), log_probs=torch.tensor(rows), name=request.param)


def test_without_quantization_it_is_the_model(measured):
    exact = torch.cat([exact.logits - exact.lse[:, None] for exact in measured.tuner.exact["search"]])
    assert (exact - measured.log_probs).abs().max() < 1e-4
    summary = measured.tuner.measure({}, "search")
    assert summary["kl_per_token"]["value"] == 0 and summary["top1_agreement"]["value"] == 1
    assert summary["num_tokens"] == len(measured.log_probs) == 44 + 22


def test_a_run_from_the_middle_ends_as_a_whole_one(measured):
    tuner, last = measured.tuner, max(measured.tuner.hooks.layers)
    assert tuner.runs.can_restart == (measured.name != "gemma3n")  # its blocks share more than what they hand on
    restarted = tuner.measure({last: "k2v2"}, "search")
    can_restart, tuner.runs.can_restart = tuner.runs.can_restart, False
    try:
        assert tuner.measure({last: "k2v2"}, "search") == restarted
    finally:
        tuner.runs.can_restart = can_restart


def test_fewer_bits_cost_more_and_sides_are_apart(measured):
    tuner, layer = measured.tuner, min(measured.tuner.hooks.layers)
    kl = {
        name: tuner.measure({layer: name}, "search")["kl_per_token"]["value"]
        for name in ("k8", "k4", "k2", "v8", "v4", "v2", "k2v2", "auto")
    }
    assert 0 <= kl["k8"] < kl["k4"] < kl["k2"] and 0 <= kl["v8"] < kl["v4"] < kl["v2"]
    assert kl["k2v2"] == pytest.approx(kl["k2"] + kl["v2"], rel=0.6) and kl["auto"] == 0


def test_errors_of_layers(measured):
    layers = measured.tuner.layer_errors(PAIRS)
    assert [layer["layer"] for layer in layers] == sorted(measured.tuner.hooks.layers)
    for layer in layers:
        assert layer["e_k"]["8"] < layer["e_k"]["6"] < layer["e_k"]["2"]
        assert layer["e_v"]["8"] < layer["e_v"]["4"] < layer["e_v"]["2"]
        assert layer["e_a"]["8"] < layer["e_a"]["6"] < layer["e_a"]["2"]
        assert layer["e_o"]["k8v8"] < layer["e_o"]["k6v4"] < layer["e_o"]["k2v2"]


@pytest.mark.parametrize("name", ["k8v8", "k6v4", "k5v2", "k6", "v4"])
def test_a_scheme_is_what_the_operators_store(measured, name):
    from vllm_int8kv.evaluation.engines.tuning_engine import through

    layer = next(iter(measured.tuner.hooks.layers.values()))
    key, value = torch.randn(2, 37, layer.num_kv_heads, layer.head_size)
    scheme, transform = Scheme.parse(name), layer.impl.key_transform
    got_k, got_v = through(scheme, layer, key, value)
    cache_format = FORMATS[f"k{scheme.k_bits or 8}v{scheme.v_bits or 8}"]
    want_k = transform.undo_keys(cache_format.round_trip_k(transform.keys(key))) if scheme.k_bits else key
    want_v = cache_format.round_trip_v(value) if scheme.v_bits else value
    assert torch.equal(got_k, want_k) and torch.equal(got_v, want_v)


def test_divergences_keep_their_digits():
    """Against double precision, where differences of log-probabilities in fp32 would be off by more than the value."""
    from vllm_int8kv.evaluation.engines.tuning_engine import ExactLogits

    torch.manual_seed(0)
    logits = 8 * torch.randn(20, 1000)
    following = torch.randint(1000, (20,))
    exact = ExactLogits(following, logits, logits.double().logsumexp(dim=-1).float(), None)
    for size in (1e-3, 1e-2, 1.0, 40.0):
        other = logits + size * torch.randn(20, 1000)
        p, q = (x.double().log_softmax(dim=-1) for x in (logits, other))
        found = exact.compare(slice(0, 20), other)
        kl = (p.exp() * (p - q)).sum(dim=-1)
        assert (found[:, KL] - kl).abs().max() < 1e-6 * size and found[:, KL].sum().item() == pytest.approx(
            kl.sum().item(), rel=1e-2
        )
        assert found[:, LOG_PROB] == pytest.approx(q.gather(1, following[:, None])[:, 0], abs=1e-5)


def test_plain_quantization_is_asymmetric_per_vector():
    from vllm_int8kv.evaluation.tuning.schemes import through_plain

    x = torch.tensor([[-1.0, 0.0, 2.0, 0.4]])
    assert through_plain(x, 2).tolist() == [[-1.0, 0.0, 2.0, 0.0]]
    x = torch.randn(100, 64) + 5
    error = reference.relative_error(through_plain(x, 8), x)
    assert 1e-4 < error < 4e-3 < reference.relative_error(through_plain(x, 4), x)

"""The quantization schemes of `python -m benchmarks.accuracy schemes`, and the simulator that scores them."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from benchmarks.accuracy import accuracy, accuracy_record, quantizers
from benchmarks.accuracy.schemes import COMPARED_FORMATS, SCHEMES, SECTIONS, Calibration, Scheme
from benchmarks.accuracy.simulator import Simulator, summarize
from vllm_int8kv.cache import ops, quantizer
from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.cache.key_transform import KeyTransform, hadamard_rotate, rotation_block

BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 40, 3, 64, 16
each_format = pytest.mark.parametrize("name", ["k8v8", *COMPARED_FORMATS])


@pytest.fixture
def vectors() -> tuple[torch.Tensor, torch.Tensor, Calibration]:
    """Keys with outliers, values off zero, and what was learned of such a layer."""
    key = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE)
    key[..., 7] *= 100
    value = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_SIZE) + torch.randn(HEAD_SIZE)
    equalizer = torch.ones(NUM_KV_HEADS, HEAD_SIZE)
    equalizer[:, 7] = 64
    return key, value, Calibration(equalizer, key.abs().amax(dim=0), value.abs().amax(dim=0))


def test_names_are_distinct_and_every_scheme_has_its_place():
    assert len(BY_NAME) == len(SCHEMES)
    assert {name for names in SECTIONS.values() for name in names} == BY_NAME.keys()


@each_format
@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_bits_of_a_format_are_those_of_its_cache(name, head_size):
    cache = FORMATS[name].allocate(2, NUM_KV_HEADS, BLOCK_SIZE, head_size)
    elements = 2 * NUM_KV_HEADS * BLOCK_SIZE * 2 * head_size
    assert BY_NAME[name].bits_per_element(head_size) == 8 * cache.numel() / elements


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("bf16", 16.0),
        ("fp8", 8.0),
        ("k6v4_values_not_rotated", 5.5),
        ("k6v4_minimum", 5.5),
        ("k6v4_symmetric", 5.25),  # two bf16 midpoints per 128 elements less
        ("int4_per_token_head", 4.5),
        ("kivi4", 5.0),
        ("kivi2", 3.0),
    ],
)
def test_bits_of_other_schemes(name, bits):
    assert BY_NAME[name].bits_per_element(64) == bits


@each_format
def test_a_format_gives_back_what_the_operators_do(name, vectors):
    key, value, calibration = vectors
    cache_format, transform = FORMATS[name], KeyTransform(equalizer=calibration.equalizer)
    kv_cache = cache_format.allocate(3, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    options = {"cache_format": cache_format, "key_transform": transform}
    ops.reshape_and_cache(key, value, kv_cache, torch.arange(NUM_TOKENS), **options)
    got_key, got_value = torch.empty_like(key), torch.empty_like(value)
    block_table, lengths = torch.arange(3, dtype=torch.int32)[None], torch.tensor([0, NUM_TOKENS], dtype=torch.int32)
    ops.gather_cache(got_key, got_value, kv_cache, block_table, lengths, torch.zeros(1, dtype=torch.int32), **options)

    keys, values = BY_NAME[name].apply(key, value, calibration)

    torch.testing.assert_close(keys, got_key, rtol=0, atol=0)
    torch.testing.assert_close(values, got_value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["k6v4", "k4v4"])
def test_an_alternative_replaces_one_choice(name, vectors):
    key, value, calibration = vectors
    base = BY_NAME[name].apply(key, value, calibration)

    def errors(alternative: str) -> list[float]:
        given = BY_NAME[f"{name}_{alternative}"].apply(key, value, calibration)
        return [((a - x).norm() / (b - x).norm()).item() for a, b, x in zip(given, base, (key, value), strict=True)]

    cache_format, equalizer = FORMATS[name], calibration.equalizer
    not_rotated, not_equalized = (
        BY_NAME[f"{name}_keys_{missing}"].apply(key, value, calibration) for missing in ("not_rotated", "not_equalized")
    )
    assert torch.equal(not_rotated[0], cache_format.round_trip_k(key / equalizer) * equalizer)
    assert torch.equal(not_equalized[0], hadamard_rotate(cache_format.round_trip_k(hadamard_rotate(key))))
    assert torch.equal(not_rotated[1], base[1]) and torch.equal(not_equalized[1], base[1])
    plain = BY_NAME[f"{name}_values_not_rotated"].apply(key, value, calibration)
    assert torch.equal(plain[0], base[0])
    assert torch.equal(plain[1], quantizer.quantize(value, 4).dequantize(4))
    assert min(errors("symmetric")) > 1.02
    assert all(0.9 < error < 1.3 and error != 1.0 for error in errors("minimum"))


@pytest.mark.parametrize("quantize", [quantizers.without_midpoint, quantizers.with_bf16_minimum])
@pytest.mark.parametrize("bits", [6, 4])
def test_alternative_quantizers_use_every_level(quantize, bits):
    ramp = torch.linspace(-3, 3, 1000).repeat(2, 1)
    ramp[1] *= 5
    got = quantize(ramp, bits)
    assert [len(row.unique()) for row in got] == 2 * [2**bits]
    steps = torch.tensor([6.0, 30.0])[:, None] / (2**bits - 1)
    # bf16 moves scale and minimum by 2^-9 of themselves, which is what the ends of the ramp are off by at most.
    assert ((got - ramp).abs() <= steps / 2 + ramp.abs().amax(dim=1, keepdim=True) * 2**-7).all()
    assert torch.equal(quantize(torch.zeros(2, 64), bits).abs() < 1e-20, torch.ones(2, 64, dtype=torch.bool))


@pytest.mark.parametrize("head_size", [64, 80, 128])
def test_signs_are_those_of_vllm(head_size):
    from vllm.v1.attention.ops.int4_per_token_head import single_rht

    x = torch.randn(5, head_size)
    got = hadamard_rotate(x * quantizers.random_signs(head_size))
    torch.testing.assert_close(got, single_rht(x) / rotation_block(head_size) ** 0.5)


def test_int4_per_token_head_is_off_by_a_step_at_most(vectors):
    key, _, _ = vectors
    signs = quantizers.random_signs(HEAD_SIZE)
    rotated = hadamard_rotate(key * signs)
    got = hadamard_rotate(quantizers.int4_per_token_head(key) * signs)
    low, high = rotated.aminmax(dim=-1, keepdim=True)
    codes = got / ((high - low) / 15)
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3, msg="zero is a level")
    assert (codes.amax(dim=-1) - codes.amin(dim=-1) <= 15.001).all()
    error = (got - rotated).abs() / ((high - low) / 15)
    # Half a step from the code, and another half where the rounded zero point cuts off an end.
    assert error.max() <= 1.001 and error.mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("bits", [4, 2])
def test_kivi_quantizes_keys_by_channel_and_values_by_token(bits, vectors):
    key, value, _ = vectors
    keys, values = BY_NAME[f"kivi{bits}"].apply(key, value, None)

    def quantized(group: np.ndarray) -> np.ndarray:
        low, scale = np.float32(np.float16(group.min())), np.float32(np.float16(np.ptp(group) / (2**bits - 1)))
        return np.clip(np.round((group - low) / scale), 0, 2**bits - 1) * scale + low

    for tokens in (slice(0, 32), slice(32, NUM_TOKENS)):
        for channel in (0, 7, 63):
            np.testing.assert_allclose(
                keys[tokens, 1, channel], quantized(key[tokens, 1, channel].numpy()), rtol=1e-5, atol=1e-5
            )
    for channels in (slice(0, 32), slice(32, 64)):
        np.testing.assert_allclose(
            values[5, 2, channels], quantized(value[5, 2, channels].numpy()), rtol=1e-5, atol=1e-5
        )


def test_fp8_on_cpu_rounds_toward_zero():
    x = torch.tensor([[[1.1, -1.1, 1000.0, 0.0]]])
    assert BY_NAME["fp8"].apply(x, x, None)[0].flatten().tolist() == [1.125, -1.125, 448.0, 0.0]
    assert BY_NAME["fp8_cpu"].apply(x, x, None)[1].flatten().tolist() == [1.0, -1.0, 448.0, 0.0]


def test_tail_and_mean_are_over_the_tokens_of_all_texts():
    got = summarize({"long": torch.arange(900.0), "short": torch.arange(900.0, 1000.0)})
    assert got["kl_per_token"] == 499.5
    assert got["kl_p999"] == pytest.approx(np.quantile(np.arange(1000.0), 0.999))
    assert got["kl_by_text"] == {"long": 449.5, "short": 949.5}


@pytest.fixture(scope="module")
def simulator(tmp_path_factory) -> Simulator:
    """Of a model with random weights in two layers, the first of which the stress reaches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=97,
        max_position_embeddings=256,
    )
    folder = tmp_path_factory.mktemp("model")
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # peaked attention: with small random weights all keys are alike
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.v_proj.weight.data *= 20
    model.save_pretrained(folder)
    return Simulator(str(folder), [list(range(50)), list(range(30))])


def test_simulator_scores_every_token(simulator):
    exact = Scheme("exact", "exact", lambda d: 8 * d, lambda k, v, c: (k, v))
    halved = Scheme("halved", "halved", lambda d: 8 * d, lambda k, v, c: (k, v / 2))
    for stress in (1, 128):
        assert [len(kl) for kl in simulator.divergences(exact, stress)] == [50, 30]
        assert all(kl.abs().max() < 1e-6 for kl in simulator.divergences(exact, stress))
        assert all(kl.min() > 5e-6 for kl in simulator.divergences(halved, stress))


def test_outliers_reach_the_keys_of_the_simulator(simulator):
    """The equalizer takes them out; a rotation alone leaves a scale that is too large for the other channels."""

    def growth(name: str) -> float:
        clean, stressed = (torch.cat(simulator.divergences(BY_NAME[name], s)).mean() for s in (1, 128))
        return (stressed / clean).item()

    assert growth("k4v4") == pytest.approx(1.0, abs=0.01)
    assert growth("int4_per_token_head") > 3


@pytest.mark.parametrize("text", ["3", "0", "-2", "", "1,x"])
def test_factors_of_outliers_are_powers_of_two(text):
    with pytest.raises(accuracy.typer.BadParameter, match="--stress must be powers of two like 1,128, got '"):
        accuracy.stress_factors(text)


def test_formats_scores_the_same_texts_on_both_models(monkeypatch, tmp_path):
    models = []

    @contextmanager
    def stressed(model, stress):
        yield tmp_path / f"{model}-{stress}"

    def evaluate(plan, caches, console, *, name, optional):
        models.append((plan.model, plan.texts, plan.paths))
        kl = {"value": 1.0, "low": 0.5, "high": 2.0}
        caches = ["auto", *(cache.name for cache in caches if cache.name not in optional)]
        return {
            "caches": {cache: {"paths": {"decode": {"kl_per_token": kl}}} for cache in caches},
            "left_out": {"fp8": "no AVX-512"},
            "text_tokens": {f"text {index}": 7 for index in range(len(plan.texts))},
        }

    monkeypatch.setattr(accuracy, "stressed", stressed)
    monkeypatch.setattr("vllm_int8kv.evaluation.evaluate.evaluate", evaluate)
    accuracy.formats(names="k8v8,k6v4", out=tmp_path)

    (clean, *same), (outliers, *others) = models
    assert (clean, outliers) == (str(tmp_path / "smollm2-1"), str(tmp_path / "smollm2-128"))
    assert same == others and same[1] == ("decode",)
    lines = accuracy_record.read("formats", tmp_path)
    assert [(line.case["stress"], line.impl) for line in lines] == [
        (factor, name) for factor in (1, 128) for name in ("k8v8", "k6v4")
    ]
    assert json.loads((tmp_path / "formats.jsonl").read_text().splitlines()[0])["case"]["texts"]["code"] == 7

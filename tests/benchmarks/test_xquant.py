"""X in place of K and V as `python -m benchmarks.accuracy xquant` simulates it."""

import math

import numpy as np
import pytest
import tiny_models
import torch
import zstandard

from benchmarks.accuracy import accuracy_record
from benchmarks.accuracy.xquant import command, entropy
from benchmarks.accuracy.xquant.inputs import (
    EQUALIZED,
    EQUALIZED_ROTATED,
    PLAIN,
    Fixed,
    InputCodec,
    Prediction,
    Stepped,
    Transform,
)
from benchmarks.accuracy.xquant.kv import BoundedCodec, SchemeCodec
from benchmarks.accuracy.xquant.latents import (
    CrossLayerLatentCodec,
    LatentCodec,
    SteppedLatentCodec,
    per_channel_fixed,
)
from benchmarks.accuracy.xquant.remat import Codec, Coded, RematSimulator, Run
from benchmarks.accuracy.xquant.rows import BEHIND_K8V8, ROWS, SECTIONS
from benchmarks.accuracy.xquant.stored import AsItIs, codec_of
from benchmarks.report import xquant_tables
from vllm_int8kv.store.inputs.layers import InputLayer
from vllm_int8kv.store.registry import INPUT_CODECS, make_input_codec

NUM_LAYERS, HIDDEN_SIZE, KV_WIDTH = 3, 192, 128
FINE = Stepped(1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> RematSimulator:
    torch.manual_seed(0)
    folder = tiny_models.llama(tmp_path_factory.mktemp("models") / "llama")
    return RematSimulator(str(folder), [list(range(60)), list(range(40, 80))])


def mean_kl(model: RematSimulator, codec: Codec) -> float:
    return torch.cat(model.score(codec).divergences).mean().item()


def test_k_and_v_of_the_input_are_those_of_the_model(model):
    score = model.score(AsItIs())
    assert [len(kl) for kl in score.divergences] == [60, 40]
    assert torch.cat(score.divergences).abs().max() < 1e-6
    assert score.perplexity_change == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "codec",
    [
        InputCodec(FINE, transform, prediction)
        for transform in (PLAIN, EQUALIZED, EQUALIZED_ROTATED, Transform(1, 0, powers_of_two=True))
        for prediction in Prediction
    ]
    + [BoundedCodec(FINE), LatentCodec(15), SteppedLatentCodec(1e-4), SteppedLatentCodec(1e-4, Prediction.none)],
    ids=repr,
)
def test_a_codec_with_many_bits_gives_back_what_it_got(codec, model):
    assert mean_kl(model, codec) < 1e-5 < mean_kl(model, InputCodec(Fixed(4)))


def inputs_of(model: RematSimulator, codec: Codec, monkeypatch) -> tuple[list[torch.Tensor], list[torch.Tensor], Run]:
    """X of every layer of the first text, as it was and as the codec gives it back."""
    given: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []
    run, project = codec.start(model), model.project

    def attention(index, q, k, v, scale):
        inputs.append(model._inputs[index][0])
        run.restore(index, inputs[-1])
        return q

    with monkeypatch.context() as patched:
        patched.setattr(model, "project", lambda index, x: given.append(x) or project(index, x))
        model._run(model.token_ids[0], attention)
    return inputs, given, run


@pytest.mark.parametrize("prediction", [Prediction.previous, Prediction.factors])
def test_errors_do_not_pile_up_across_layers(prediction, model, monkeypatch):
    """What a layer is predicted from is what will be given back of the one before, not its X."""
    codec = InputCodec(Stepped(0.5), EQUALIZED, prediction)
    inputs, given, run = inputs_of(model, codec, monkeypatch)
    before, x, restored = given[1], inputs[2], given[2]
    random_before, random = (model.layers[i].random_input for i in (1, 2))
    weight = 1.0
    if prediction is Prediction.factors:  # a least-squares fit through the origin, channel by channel
        weight = torch.stack(
            [torch.linalg.lstsq(a[:, None], b).solution[0] for a, b in zip(random_before.T, random.T, strict=True)]
        )
    factors = EQUALIZED.factors(model.layers[2], random - random_before * weight)
    difference = (x - before * weight) * factors
    steps = 0.5 * difference.square().mean(dim=1, keepdim=True).sqrt()
    assert ((restored - x).abs() * factors <= steps / 2 * 1.01).all()
    torch.testing.assert_close(run.coded[2].codes.float(), difference / steps, rtol=0.01, atol=0.51)


def test_the_first_layers_are_not_predicted(model, monkeypatch):
    first = (Fixed(8), Fixed(8))
    inputs, given, run = inputs_of(model, InputCodec(Fixed(4), PLAIN, Prediction.previous, first), monkeypatch)
    assert [coded.bits for coded in run.coded] == [8, 8, 4]
    assert torch.equal(given[1], Fixed(8).quantize(inputs[1])[0])
    assert torch.equal(given[2], Fixed(4).quantize(inputs[2] - given[1])[0] + given[1])


@pytest.mark.parametrize("midpoint", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_fixed_codes_fit_their_bits_and_are_half_a_step_off(bits, midpoint):
    y = torch.randn(50, HIDDEN_SIZE) + 2
    restored, coded = Fixed(bits, 64, midpoint).quantize(y)
    assert coded.codes.amin() >= -(2 ** (bits - 1)) and coded.codes.amax() < 2 ** (bits - 1)
    assert (coded.bits, coded.param_bytes) == (bits, 12 if midpoint else 6)
    groups = y.unflatten(1, (-1, 64))
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    width = high - low if midpoint else 2 * torch.maximum(high.abs(), low.abs())
    # bf16 moves a scale and a midpoint by 2^-9 of themselves, which is what the ends are off by at most.
    allowed = width / (2**bits - 1) / 2 + groups.abs().amax(dim=-1) * 2**-7
    assert ((restored - y).unflatten(1, (-1, 64)).abs() <= allowed[..., None]).all()


def test_the_last_group_may_be_smaller():
    _, coded = Fixed(8, 128).quantize(torch.randn(3, HIDDEN_SIZE))
    assert coded.codes.shape == (3, HIDDEN_SIZE) and coded.param_bytes == 8


def test_steps_follow_tokens_or_blocks():
    y = torch.randn(64, HIDDEN_SIZE) * torch.logspace(-1, 1, 64)[:, None]
    for quantizer, rms in (
        (Stepped(0.1), y.square().mean(dim=1, keepdim=True).sqrt()),
        (Stepped(0.1, block=16), y.view(4, -1).square().mean(dim=1).sqrt().repeat_interleave(16)[:, None]),
    ):
        restored, coded = quantizer.quantize(y)
        assert ((restored - y).abs() <= 0.05 * 1.01 * rms).all()
        steps = (restored / coded.codes).abs().nanmedian(dim=1).values
        torch.testing.assert_close(steps, 0.1 * rms.flatten(), rtol=0.01, atol=0)
    sink = Stepped(0.1, first_token=0.125).quantize(y)[0] - y
    plain = Stepped(0.1).quantize(y)[0] - y
    assert sink[0].norm() < plain[0].norm() / 6 and torch.equal(sink[1:], plain[1:])


def test_equalized_channels_balance_weights_and_input(model):
    layer = model.layers[1]
    quantized = layer.random_input * torch.logspace(-2, 2, HIDDEN_SIZE)
    rms = quantized.square().mean(dim=0).sqrt()
    norms = torch.cat([layer.w_k, layer.w_v]).norm(dim=0)
    factors = EQUALIZED.factors(layer, quantized)
    ratio = factors / (norms / rms).sqrt()
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert factors.log().mean().abs() < 1e-5
    powers = Transform(powers_of_two=True).factors(layer, quantized)
    assert torch.equal(powers.log2(), powers.log2().round())
    assert ((powers / factors).log2().abs() <= 0.5).all()


def test_latents_are_as_wide_as_k_and_v(model):
    score = model.score(LatentCodec(4))
    assert [coded.codes.shape[1] for coded in score.coded[0]] == [KV_WIDTH] * 2 * NUM_LAYERS
    assert [coded.param_bytes for coded in score.coded[0][:2]] == [KV_WIDTH * 4 / 60, 4]
    across = model.score(CrossLayerLatentCodec(4))
    assert [coded.codes.shape[1] for coded in across.coded[0]] == [HIDDEN_SIZE] * NUM_LAYERS


def test_what_is_simulated_is_what_the_store_does(model, monkeypatch, tmp_path):
    inputs, given, run = inputs_of(model, SteppedLatentCodec(0.1), monkeypatch)
    squares = [[w.T @ w for w in (layer.w_k, layer.w_v)] for layer in model.layers]
    metrics = [sum(own / own.trace() for own in layer) for layer in squares]
    layers = [InputLayer(str(number), HIDDEN_SIZE, len(inputs[0]), torch.float32) for number in range(NUM_LAYERS)]
    codec = make_input_codec("xsvd:0.1", layers, tmp_path, metrics)
    payloads = codec.encode([x[None] for x in inputs])
    for layer, got, want in zip(model.layers, codec.decode(payloads), given, strict=True):
        for weight in (layer.w_k, layer.w_v):
            torch.testing.assert_close(got[0] @ weight.T, want @ weight.T, rtol=1e-3, atol=1e-3)
    assert len(payloads[0]) < 1.2 * len(inputs[0]) * entropy.zstd_bytes([run.coded], len(inputs[0]))


def test_a_prefix_comes_back_to_those_behind_it_only(model):
    prefix_tokens = 30
    for codec, allowed in ((AsItIs(), 1e-6), (InputCodec(Fixed(3)), math.inf)):
        score = model.score(codec, prefix_tokens=prefix_tokens)
        assert [len(kl) for kl in score.divergences] == [60 - prefix_tokens - 1, 40 - prefix_tokens - 1]
        assert torch.cat(score.divergences).max() < allowed
    whole = torch.cat([kl[prefix_tokens + 1 :] for kl in model.score(InputCodec(Fixed(3))).divergences])
    assert 0 < torch.cat(score.divergences).mean() < whole.mean()
    pages = model.score(AsItIs(), behind_k8v8=True, prefix_tokens=prefix_tokens)
    same = model.score(AsItIs(), behind_k8v8=True)
    for got, want in zip(pages.divergences, same.divergences, strict=True):
        torch.testing.assert_close(got, want[prefix_tokens + 1 :])


@pytest.mark.parametrize("name", [*INPUT_CODECS, "exact", "k6v4", "k4v4+zstd", "bound:0.1", "xbound:0.1", "xsvd:0.1"])
def test_every_codec_of_the_store_is_simulated(model, name):
    lossless = name in ("exact", "x")
    assert (mean_kl(model, codec_of(name)) < 1e-6) == lossless


def test_other_codecs_are_refused():
    with pytest.raises(ValueError, match="there is no codec 'k9v9'"):
        codec_of("k9v9")


def test_latent_keys_share_scales_along_tokens():
    x = torch.randn(150, 5) * torch.tensor([1.0, 1e3, 1.0, 1.0, 1e-3])
    restored, coded = per_channel_fixed(x, 8)
    assert coded.codes.shape == x.shape and coded.param_bytes == 2 * 4 * 5 / 150
    assert ((restored - x).abs() <= x.abs().amax(dim=0) / 100).all()


def texts_of(codes: np.ndarray, bits: int | None = 8, param_bytes: float = 2.0) -> list[list[Coded]]:
    return [[Coded(torch.from_numpy(codes.astype(np.int16)), bits, param_bytes)]]


def test_bytes_of_codes():
    rng = np.random.default_rng(0)
    uniform = rng.integers(-8, 8, (4096, 64))
    assert entropy.fixed_bytes(texts_of(uniform, bits=4)) == 34
    assert entropy.fixed_bytes(texts_of(uniform, bits=None)) is None
    assert entropy.ideal_bytes(texts_of(uniform)) == pytest.approx(34, rel=0.01)
    per_channel = rng.integers(0, 2, (4096, 64)) + 100 * np.arange(64)
    assert entropy.ideal_bytes(texts_of(per_channel)) == pytest.approx(8 + 2, rel=0.01), "a table per channel"
    packed = entropy.zstd_bytes(texts_of(uniform), 128)
    assert 34 < packed < 1.2 * 34 + 64 / 2 / 128 * 64


@pytest.mark.parametrize("largest", [100, 1000])
def test_frames_hold_every_code(largest):
    rng = np.random.default_rng(0)
    codes = rng.integers(-largest, largest, (32, 64)) // np.arange(1, 33)[:, None]
    codes[5, 7] = -128  # fits into a byte, and its negative does not
    frames = entropy._frames(codes)
    is_wide = (codes.max(axis=1) > 127) | (codes.min(axis=1) < -128)
    assert is_wide.any() == (largest == 1000)
    narrow = np.concatenate(frames[:16])
    assert sorted(map(tuple, narrow)) == sorted(map(tuple, codes[~is_wide]))
    if is_wide.any():
        low, high = frames[16:]
        assert np.array_equal(high.astype(int) * 256 + low, codes[is_wide])
    for frame in frames:
        assert zstandard.decompress(zstandard.compress(frame.tobytes(), 1)) == frame.tobytes()


def test_every_row_has_a_name_of_its_own():
    assert len(ROWS) == sum(map(len, SECTIONS.values()))
    assert set(BEHIND_K8V8) <= ROWS.keys()


def test_rows_of_k_and_v_know_their_bytes(model):
    row = ROWS["k8v8"]
    assert isinstance(row.codec, SchemeCodec)
    assert row.codec.bytes_per_token(model) == NUM_LAYERS * 2 * (128 + 4)
    metrics = command.measure(model, row, ["one", "two"])
    assert metrics["bytes_per_token"] == NUM_LAYERS * 2 * (128 + 4) and metrics["zstd_bytes"] == {}


def test_a_row_is_measured_and_recorded(monkeypatch, tmp_path, model):
    monkeypatch.setattr("benchmarks.accuracy.xquant.command.resolve", lambda name: name)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda folder: Tokenizer())
    monkeypatch.setattr("benchmarks.accuracy.xquant.remat.RematSimulator", lambda folder, ids: model)
    monkeypatch.setattr("benchmarks.accuracy.xquant.command.texts", lambda: {"one": "", "two": ""})
    monkeypatch.setattr("benchmarks.accuracy.xquant.command.BLOCK_SIZES", (16, 32))
    monkeypatch.setattr("benchmarks.accuracy.xquant.command.STORE_BLOCK_SIZE", 32)
    command.score_codecs(model="tiny", name="a model", tokens=60, only="x8 best g64,xe:0.1", out=tmp_path)
    lines = accuracy_record.read("xquant", tmp_path)
    assert [line.impl for line in lines] == ["x8 best g64", "x8 best g64 symmetric", "xe:0.1"]
    assert lines[0].case["model"] == "a model" and lines[0].case["texts"] == {"one": 60, "two": 40}
    best, _, stepped = (line.metrics for line in lines)
    assert best["bytes_per_token"] == NUM_LAYERS * (HIDDEN_SIZE + 3 * 4) and stepped["bytes_per_token"] is None
    assert best["zstd_bytes"].keys() == {"32"}
    assert stepped["zstd_bytes"].keys() == {"16", "32"} and stepped["ideal_bytes"] > 0
    assert math.isfinite(best["perplexity_change"]) and best["kl_per_token"] < stepped["kl_per_token"]
    behind = lines[1].metrics["kl_behind_k8v8"]
    assert behind > lines[1].metrics["kl_per_token"]
    with pytest.raises(SystemExit, match="--only: no row begins with 'x9'"):
        command.score_codecs(model="tiny", tokens=60, only="x9", out=tmp_path)


def test_the_table_compares_bytes_with_k8v8(tmp_path):
    case = {"texts": {"one": 60}, "num_layers": 2, "num_kv_heads": 3, "head_size": 64, "hidden_size": 576}
    common = {"kl_per_token": 1e-4, "kl_p999": 1e-3, "perplexity_change": 0.001, "ideal_bytes": None}

    def add(impl: str, packed: float | None, zstd: float | None, model: str = "smollm2") -> None:
        sizes = {} if zstd is None else dict.fromkeys(("16", "32", "64", "128"), zstd)
        metrics = common | {"bytes_per_token": packed, "zstd_bytes": sizes}
        accuracy_record.append("xquant", case | {"model": model}, impl, metrics, tmp_path / "accuracy")

    assert xquant_tables.simulated_table(tmp_path) == xquant_tables.NOT_SIMULATED
    k8v8 = 2 * 3 * (128 + 4)
    add("k8v8", k8v8, None)
    add("x8 best", 2 * k8v8, 1.9 * k8v8)
    add("xe:0.025", None, 1.5 * k8v8)
    add("svd8", k8v8, k8v8)
    add("x8 best", 2 * k8v8, 1.9 * k8v8, "smollm2, MHA copy")
    table = xquant_tables.simulated_table(tmp_path)

    def ratios(name: str) -> list[str]:
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {ROWS[name].meaning} |"))
        return [cell.strip() for cell in row.split("|")[5:7]]

    assert ratios("k8v8") == ["1.00", "1.00"], "K and V grow with the number of KV heads"
    assert ratios("x8 best") == ["2.00", "0.67"], "packed, though zstandard makes it smaller"
    assert ratios("xe:0.025") == ["1.50", "0.50"]
    assert ratios("svd8") == ["1.00", "-"]
    assert "KL on the MHA copy: x8 best 1.0e-04 (here 1.0e-04)." in table


class Tokenizer:
    def encode(self, text: str) -> list[int]:
        return list(range(60))

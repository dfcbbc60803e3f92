"""`vllm-int8kv tune` from the command line to the policy, with a model of four layers in the place of an engine."""

import json
from importlib.util import find_spec

import pytest
import yaml
from typer.testing import CliRunner

from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.commands import cli, configs
from vllm_int8kv.commands import tune as command
from vllm_int8kv.config import read_layer_policy
from vllm_int8kv.evaluation.demo import TEXT
from vllm_int8kv.evaluation.tuning import report as reports
from vllm_int8kv.evaluation.tuning import tune
from vllm_int8kv.evaluation.tuning.schemes import Scheme

WEIGHTS = (1.0, 16.0, 4.0, 2.0)
"""What the layers lose, against the first."""
OTHERS = {"fp8": 4.0, "bf16": 8.0}
runner = CliRunner()


def kl_of(policy: dict[str, str]) -> float:
    """A bit less costs four times as much, and K needs a bit more than V."""
    total = 0.0
    for layer, name in policy.items():
        scheme = Scheme.parse(name)
        k_bits, v_bits = (OTHERS.get(name, bits) for bits in (scheme.k_bits, scheme.v_bits))
        total += WEIGHTS[int(layer)] * sum(4.0 ** -(b - e) for b, e in ((k_bits, 1), (v_bits, 0)) if b is not None)
    return total


class FakeEngine:
    """Answers as `tuning_engine` does."""

    num_asked = 0
    interrupt_after: int | None = None
    perplexity = 20.0

    def __init__(self, module, name, on_progress, verbose):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def ask(self, message):
        cls = type(self)
        if "model" in message:
            shape = {"num_kv_heads": 2, "head_size": 64, "itemsize": 2, "cache_format": "k8v8"}
            shapes = {str(layer): shape for layer in range(len(WEIGHTS))}  # as they come out of JSON
            fixed = {"sharing": {}, "dtype": "float32", "seconds_per_token": 1e-3, "can_restart": True}
            perplexity = dict.fromkeys(("search", "held_out"), self.perplexity)
            return {"token_ids": [[1] * 100], "shapes": shapes, "perplexity": perplexity, **fixed}
        cls.num_asked += 1
        if cls.num_asked == cls.interrupt_after:
            raise KeyboardInterrupt
        if "pairs" in message:
            errors = {"e_k": {}, "e_v": {}, "e_a": {}, "e_o": {}}
            return {"layers": [{"layer": layer, **errors} for layer in range(len(WEIGHTS))]}
        kl = kl_of(message["policy"]) * (1.1 if message["half"] == "held_out" else 1)
        interval = {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl}
        change = {"value": kl, "low": kl, "high": kl}
        return {"kl_per_token": interval, "kl_p999": 10 * kl, "perplexity": 20.0, "perplexity_change": change}


@pytest.fixture(autouse=True)
def fake_engine(monkeypatch):
    monkeypatch.setattr(tune, "EngineProcess", FakeEngine)
    monkeypatch.setattr("vllm_int8kv.commands.models.resolve", lambda model, say: model)
    monkeypatch.setattr(cli.console, "width", 160)
    for name, value in (("num_asked", 0), ("interrupt_after", None), ("perplexity", 20.0)):
        monkeypatch.setattr(FakeEngine, name, value)


def run(folder, *options, exit_code=0):
    """The report and the policy of a run."""
    report, policy = folder / "report.json", folder / "policy.yaml"
    common = ["--text", str(TEXT), "--json", str(report)]
    if "--evaluate" not in options:
        common += ["--policy", str(policy)]
    result = runner.invoke(cli.app, ["tune", "some/model", *common, *map(str, options)])
    assert result.exit_code == exit_code, result.output
    if exit_code:
        return result.output
    return json.loads(report.read_text()), policy


def pick_of(report):
    return reports.picked(report)


@pytest.mark.parametrize("search", ["additive", "nsga2"])
@pytest.mark.parametrize(
    ("limit", "keeps"),
    [
        (("--max-bits", 5), lambda pick: 4.5 < pick["bits"] <= 5),
        (("--max-kl", 0.05), lambda pick: 0.02 < pick["search"]["kl_per_token"]["value"] <= 0.05),
        (("--min-tokens-ratio", 3), lambda pick: 3 <= pick["tokens_ratio"] < 3.3),
        ((), lambda pick: 2 < pick["tokens_ratio"] < 6),
    ],
    ids=["bits", "kl", "tokens", "knee"],
)
def test_the_policy_keeps_to_its_limit(tmp_path, search, limit, keeps):
    report, policy = run(tmp_path, *limit, "--search", search, "--trials", 60)
    pick = pick_of(report)
    assert keeps(pick)
    names = [point["name"] for point in report["points"]]
    assert len(set(names)) == len(names)  # also of policies that have the same bits
    found = read_layer_policy(policy, len(WEIGHTS), FORMATS)
    assert found == {int(layer): name for layer, name in pick["policy"].items()} and len(found) == len(WEIGHTS)
    content_bytes = sum(2 * FORMATS[name].content_bytes(64) for name in found.values())
    assert pick["tokens_ratio"] == pytest.approx(len(WEIGHTS) * 2 * 2 * 64 * 2 / content_bytes)
    assert pick["predicted_kl"] == pytest.approx(pick["search"]["kl_per_token"]["value"])  # this model is additive
    bits = [sum(map(int, (name[1], name[3]))) for _, name in sorted(found.items())]
    assert bits[1] == max(bits) and bits[0] == min(bits)  # the layer that loses most has most


def test_a_tuned_policy_beats_one_format_for_all(tmp_path):
    report, _ = run(tmp_path, "--max-bits", 5)
    points = {point["name"]: point for point in report["points"]}
    assert pick_of(report)["search"]["kl_per_token"]["value"] < 0.6 * points["k6v4"]["search"]["kl_per_token"]["value"]
    assert {"k8v8", "k6v4", "fp8", "plain:k8v8", "plain:k4v4"} <= points.keys()
    assert all(check["measured"] == pytest.approx(check["predicted"]) for check in report["pair_checks"])
    assert [layer["layer"] for layer in report["layers"]] == [0, 1, 2, 3]
    assert report["layers"][1]["kl"]["k4"] == pytest.approx(16 * 4.0**-3)


def test_pairs_are_those_that_were_given(tmp_path):
    report, policy = run(tmp_path, "--max-bits", 5, "--pairs", "k8v8,k8v4,k4v8,k4v4")
    assert set(read_layer_policy(policy, 4, FORMATS).values()) <= {"k8v8", "k8v4", "k4v8", "k4v4"}
    assert set(report["layers"][0]["kl"]) == {"k8", "k4", "v8", "v4"}


@pytest.mark.parametrize("search", ["additive", "nsga2"])
def test_interrupted_anywhere_and_resumed_it_picks_the_same(tmp_path, search):
    options = ("--max-kl", 0.02, "--search", search, "--trials", 30)
    expected, _ = run(tmp_path, *options)
    num_asked = FakeEngine.num_asked
    for interrupt_after in (1, 2, num_asked // 3, num_asked // 2, num_asked - 5, num_asked):
        folder = tmp_path / str(interrupt_after)
        folder.mkdir()
        FakeEngine.num_asked, FakeEngine.interrupt_after = 0, interrupt_after
        output = run(folder, *options, exit_code=1)
        assert "run it again to go on" in " ".join(output.split())
        FakeEngine.num_asked, FakeEngine.interrupt_after = 0, None
        report, policy = run(folder, *options)
        assert FakeEngine.num_asked == num_asked - interrupt_after + 1
        assert (report["pick"], report["points"]) == (expected["pick"], expected["points"])
        assert policy.read_text() == (tmp_path / "policy.yaml").read_text()


def test_another_limit_reuses_what_was_measured(tmp_path):
    run(tmp_path, "--max-bits", 5)
    before, FakeEngine.num_asked = FakeEngine.num_asked, 0
    run(tmp_path, "--max-bits", 4.2)
    assert 0 < FakeEngine.num_asked < before / 3
    FakeEngine.num_asked = 0
    run(tmp_path, "--max-bits", 5, "--fresh")
    assert FakeEngine.num_asked == before


def test_policies_of_others_stand_in_one_table(tmp_path):
    ours = tmp_path / "ours.yaml"
    ours.write_text(yaml.safe_dump({0: "k4v4", 1: "k8v8", 3: "auto"}))
    theirs = tmp_path / "Model_kivi_KVTuner4_0.yaml"
    theirs.write_text(yaml.safe_dump({layer: {"nbits_key": 4, "nbits_value": 2} for layer in range(4)}))
    plot = tmp_path / "plot.png"
    report, _ = run(tmp_path, "--evaluate", ours, "--evaluate", theirs, "--plot", plot)
    points = {point["name"]: point for point in report["points"]}
    assert points[str(ours)]["policy"] == {"0": "k4v4", "1": "k8v8", "2": "k8v8", "3": "auto"}
    named = {"0": "k4v4", "1": "k8v8", "2": "k8v8"}
    assert points[str(ours)]["held_out"]["kl_per_token"]["value"] == pytest.approx(1.1 * kl_of(named))
    assert points[str(ours)]["bits"] == (4 + 8 + 8 + 16) / 4
    assert points[str(theirs)]["bits"] == 3 and points["fp8"]["tokens_ratio"] == 2
    assert report["pick"] is None and plot.stat().st_size > 0


def test_policies_that_come_with_the_package_are_found_by_name(tmp_path):
    """KVTuner's for Llama-3.1-8B names layers that a model of four has not."""
    output = run(tmp_path, "--evaluate", "llama_3_1_8b_kvtuner_c5_44", exit_code=1)
    assert "llama_3_1_8b_kvtuner_c5_44.yaml names layer 4; the model has layers 0 to 3" in " ".join(output.split())


@pytest.mark.parametrize(
    ("name", "num_layers", "mean_bits"),
    [("llama_3_1_8b_kvtuner_c5_44", 32, 5.44), ("qwen2_5_7b_kvtuner_c4_00", 28, 4.0)],
)
def test_policies_of_kvtuner_have_the_bits_of_the_paper(name, num_layers, mean_bits):
    policy = read_layer_policy(configs.find("policies", name), num_layers, FORMATS)
    bits = [sum(map(int, (found[1], found[3]))) / 2 for found in policy.values()]
    assert len(bits) == num_layers and sum(bits) / num_layers == pytest.approx(mean_bits, abs=5e-3)


def test_a_file_for_kivi_is_warned_of(tmp_path):
    path = tmp_path / "Qwen_kivi_KVTuner4_0.yaml"
    path.write_text(yaml.safe_dump({layer: {"nbits_key": 4, "nbits_value": 2} for layer in range(4)}))
    result = runner.invoke(cli.app, ["tune", "some/model", "--text", str(TEXT), "--evaluate", str(path)])
    assert f"{path.name} was tuned for KIVI, whose K has scales per channel" in result.output


def test_a_model_that_has_changed_is_noticed(tmp_path, monkeypatch):
    run(tmp_path, "--max-bits", 5)
    monkeypatch.setattr(FakeEngine, "perplexity", 21.0)
    output = run(tmp_path, "--max-bits", 5, exit_code=1)
    assert "the perplexity of the exact model was 20.0000 and is 21.0000, so its weights have changed" in output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max-bits", "5", "--max-kl", "0.1"], "--max-bits and --max-kl: expected one limit at most"),
        (["--max-kl", "-1"], "--max-kl must be positive, got -1"),
        (["--max-bits", "nan"], "--max-bits must be positive, got nan"),
        (["--max-bits", "1.5"], "--max-bits 1.5 cannot be met: --pairs begin at 2 bits"),
        (["--max-bits", "5", "--pairs", "k8v8"], "--max-bits 5 cannot be met: --pairs begin at 8 bits"),
        (["--min-tokens-ratio", "9"], "--min-tokens-ratio 9 cannot be met: --pairs reach"),
        (["--max-kl", "1e-7"], "--max-kl 1e-07 cannot be met: with the most bits of --pairs KL is 0.0018"),
        (["--pairs", "k8v8,k7v4"], "--pairs must be one of k8v8, k8v6,"),
        (["--pairs", "k8v8,k8v8"], "--pairs names k8v8 twice"),
        (["--search", "random"], "--search must be one of additive, nsga2, got 'random'"),
        (["--text", "/dev/null"], "--text: /dev/null holds no text"),
        (
            ["--evaluate", "missing.yaml"],
            "missing.yaml is no file, and none that comes with the package: llama_3_1",
        ),
        (["--evaluate", "{layers}"], "names layer 4; the model has layers 0 to 3"),
        (["--evaluate", "{layers}", "--policy", "x.yaml"], "--policy: --evaluate searches for no policy"),
        (["--policy", "no/such/folder/x.yaml"], "--policy: the folder"),
        (["--journal", "{layers}"], "is no journal of tune"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, monkeypatch, options, problem):
    monkeypatch.chdir(tmp_path)
    layers = tmp_path / "layers.yaml"
    layers.write_text("4: k8v8\n")
    options = [option.format(layers=layers) for option in options]
    result = runner.invoke(cli.app, ["tune", "some/model", "--text", str(TEXT), *options])
    assert result.exit_code == 1 and problem in result.output
    assert layers.read_text() == "4: k8v8\n"


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "optuna" else find_spec(name))
    result = runner.invoke(cli.app, ["tune", "some/model"])
    assert result.exit_code == 1 and "tune needs optuna: install the extra vllm-int8kv[tune]" in result.output

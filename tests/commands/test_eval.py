"""`vllm-int8kv eval` on the real model, at a small scale, and its messages for bad input.

Bounds leave room around what README's table has for more tokens: KL 1.9e-4 for int8_custom, 2.9e-2 for fp8.
"""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from vllm_int8kv.commands import cli, models
from vllm_int8kv.config import read_layer_policy
from vllm_int8kv.evaluation import evaluate, sensitivity
from vllm_int8kv.evaluation.demo import TEXT
from vllm_int8kv.evaluation.engines.process import EngineError
from vllm_int8kv.evaluation.evaluate import CacheSpec, first_divergence
from vllm_int8kv.evaluation.scoring import TextFiles

runner = CliRunner()
PLAIN = "int8_custom:rotate_keys=false:equalize_keys=false"


@pytest.mark.engine
def test_eval_through_every_read_path(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads of a pool wait for one another on a busy machine
    report_file = tmp_path / "report.json"
    sizes = ["--tokens", "160", "--chunk-tokens", "64", "--generate-tokens", "8", "--needle-lengths", "80"]
    options = ["--text", str(TEXT), *sizes, "--dtypes", f"int8_custom,{PLAIN}", "--json", str(report_file)]
    result = runner.invoke(cli.app, ["eval", "smollm2", *options])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    assert list(report["caches"]) == ["auto", "int8_custom", PLAIN]
    assert report["dtype"] == "float32"
    ours, plain, auto = (report["caches"][name]["paths"] for name in ("int8_custom", PLAIN, "auto"))
    assert list(ours) == ["decode", "prefill", "chunked", "prefix"]
    assert ours["decode"]["num_tokens"] == 159
    assert 0 < ours["decode"]["kl_per_token"]["value"] < 4e-4
    assert ours["decode"]["kl_per_token"]["value"] < 0.5 * plain["decode"]["kl_per_token"]["value"]
    assert ours["decode"]["top1_agreement"]["value"] > 0.97
    assert abs(ours["decode"]["perplexity_change"]["value"]) < 0.01
    for path in ("prefill", "chunked", "prefix"):
        # The arithmetic of another batch shape; what INT8 costs is a hundred times more.
        assert auto[path]["kl_per_token"]["value"] < 1e-6
        assert ours[path]["log_prob_difference_from_decode"]["mean_abs"] < 2e-3
    assert report["caches"]["int8_custom"]["first_divergence"]["max_tokens"] == 8
    assert [cell["length"] for cell in report["caches"]["int8_custom"]["needle"]] == [80] * 5
    assert "decode steps" in result.output and "Greedy answers" in result.output


@pytest.mark.engine
def test_eval_scores_what_the_model_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report_file = tmp_path / "report.json"
    sizes = ["--samples", "2", "--tokens", "24", "--generate-tokens", "0", "--needle-lengths", "", "--paths", "decode"]
    result = runner.invoke(cli.app, ["eval", "smollm2", *sizes, "--json", str(report_file)])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    assert report["text_source"] == "samples of the model"
    assert list(report["text_tokens"].values()) == [24, 24]
    kl = {name: cache["paths"]["decode"]["kl_per_token"]["value"] for name, cache in report["caches"].items()}
    assert 0 < kl["int8_custom"] < 1e-3
    if torch.cpu._is_avx512_supported():
        assert 1e-3 < kl["fp8"] < 0.1 and report["left_out"] == {}
    else:
        assert "requires x86 with AVX-512" in report["left_out"]["fp8"]
        assert "fp8 is left out, vLLM does not run it here" in " ".join(result.output.split())


@pytest.mark.engine
def test_arguments_of_an_engine_and_an_engine_that_fails(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"paths": "decode", "needle_lengths": "", "engine_options": "{}", "model": str(models.smollm2())}
    plan = evaluate.make_plan([], **options, max_tokens=24, num_samples=1, generate_tokens=0)
    larger, too_small = f"auto:kv_cache_memory_bytes={2**28}", "auto:kv_cache_memory_bytes=1000"
    caches, quiet = [CacheSpec.parse(larger), CacheSpec.parse(too_small)], Console(quiet=True)
    report = evaluate.evaluate(plan, caches, quiet, name="smollm2", optional=[too_small])
    assert list(report["caches"]) == ["auto", larger]
    assert report["caches"][larger]["kv_cache_tokens"] == 2**28 // (2 * 30 * 3 * 64 * 4) // 128 * 128
    assert report["caches"]["auto"]["kv_cache_tokens"] < report["caches"][larger]["kv_cache_tokens"]
    assert report["caches"][larger]["paths"]["decode"]["kl_per_token"]["value"] < 1e-6
    assert list(report["left_out"]) == [too_small]
    assert report["left_out"][too_small].startswith("ValueError: No available memory for the cache blocks.")


def test_a_chunk_larger_than_asked_for_is_refused(tmp_path):
    from vllm.v1.sample.sampler import Sampler

    from vllm_int8kv.evaluation.engines.forced_decoding import PromptScoring

    files = TextFiles([0, 1, 2, 3], str(tmp_path / "p.npy"), str(tmp_path / "reference.npy"), is_reference=True)
    files.create(vocab_size=5)
    worker = PromptScoring()
    worker.model_runner = SimpleNamespace(sampler=Sampler())
    worker.score_next_prompt(asdict(files), chunk_tokens=2)
    worker.model_runner.sampler.compute_logprobs(torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match="a chunk of 3 tokens instead of 2 at most"):
        worker.model_runner.sampler.compute_logprobs(torch.zeros(3, 5))


def test_an_engine_that_fails_and_is_not_optional_ends_the_comparison(monkeypatch):
    def run_cache(plan, name, **kwargs):
        if name == "fp8":
            raise EngineError("its last lines:\n[rank0]: NotImplementedError: no fp8 here\n")
        return {"token_ids": [[1, 2]]}

    monkeypatch.setattr(evaluate, "_run_cache", run_cache)
    with pytest.raises(EngineError, match="no fp8 here") as error:
        evaluate.evaluate(evaluate.EvalPlan("model"), [CacheSpec.parse("fp8")], Console(quiet=True), name="model")
    assert error.value.last_line == "NotImplementedError: no fp8 here"


@pytest.mark.engine
def test_sensitivity_ranks_layers_and_writes_a_policy(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report_file, policy, plot = (tmp_path / name for name in ("report.json", "policy.yaml", "plot.png"))
    options = ["--text", str(TEXT), "--tokens", "48", "--json", str(report_file), "--policy", str(policy)]
    result = runner.invoke(cli.app, ["eval", "smollm2", "--sensitivity", *options, "--plot", str(plot)])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    divergences = [layer["kl_per_token"] for layer in report["layers"]]
    assert len(divergences) == 30 and divergences == sorted(divergences, reverse=True)
    assert all(0 < value < report["kl_all_layers"] for value in divergences)
    assert all(1e-3 < layer["e_o"] < 0.05 for layer in report["layers"])
    assert report["capacity_ratio"] == pytest.approx(256 / 132)
    assert set(read_layer_policy(policy, 30)) == set(range(30))
    assert plot.stat().st_size > 0


def test_suggested_policy_and_its_price():
    shape = {"num_kv_heads": 2, "head_size": 64, "itemsize": 2}
    layers = [{"layer": layer, "kl_per_token": kl, "shape": shape} for layer, kl in ((3, 9.0), (0, 1.0), (1, 1.0))]
    found = sensitivity.suggest([*layers, {"layer": 2, "kl_per_token": 1.0, "shape": shape}])
    assert found["policy"] == {3: "auto"}
    assert found["kl_removed"] == pytest.approx(0.75)
    assert found["capacity_ratio_with_policy"] == pytest.approx(4 * 256 / (3 * 132 + 256))


def test_first_divergence():
    found = first_divergence([[1, 2, 3, 4]] * 3, [[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 9]])
    assert found["positions"] == [None, 1, 3]
    assert (found["same"], found["mean_tokens"], found["max_tokens"]) == (1 / 3, 8 / 3, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dtypes", "int8_custom:rotate_keys"],
            "--dtypes: expected OPTION=VALUE after int8_custom:, got 'rotate_keys'",
        ),
        (["--dtypes", "int8_custom:rotate=true"], "has no option 'rotate'"),
        (["--paths", "decode,verify"], "--paths must be some of decode, prefill, chunked, prefix, got 'verify'"),
        (["--needle-lengths", "1k"], "--needle-lengths must be numbers of tokens like 512,1024, got '1k'"),
        (["--engine-options", "[]"], "--engine-options must be a JSON object, got '[]'"),
        (["--text", "/no/such/file"], "--text: cannot read /no/such/file"),
        (["--json", "/no/such/folder/report.json"], "--json: the folder /no/such/folder does not exist"),
        (["--plot", "plot.png"], "--plot needs --sensitivity"),
    ],
)
def test_eval_refuses_bad_options(options, message, monkeypatch):
    monkeypatch.setattr(models, "resolve", lambda model: model)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("started"))
    result = runner.invoke(cli.app, ["eval", "some/model", *options])
    assert result.exit_code == 1
    assert message in result.stderr


def test_cache_spec():
    spec = CacheSpec.parse(PLAIN)
    assert (spec.kv_cache_dtype, spec.int8_kv) == ("int8_custom", {"rotate_keys": False, "equalize_keys": False})
    assert CacheSpec.parse("fp8_e5m2") == CacheSpec("fp8_e5m2", "fp8_e5m2")
    assert CacheSpec.parse("fp8:calculate_kv_scales=true").engine_options == {"calculate_kv_scales": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"must hold a mapping of layers to int8 or auto, got \[1\]"),
        ("7: auto", "names layer 7; the model has layers 0 to 3"),
        ("true: auto", "names layer True"),
        ("1: fp8", "gives layer 1 the format 'fp8'; use int8 or auto"),
        ("{", "cannot be read"),
    ],
)
def test_layer_policy_refuses(text, message, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layer_policy(path, 4)


def test_layer_policy_as_json(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"0": "auto", "2": "int8"}')
    assert read_layer_policy(path, 4) == {0: "auto", 2: "int8"}

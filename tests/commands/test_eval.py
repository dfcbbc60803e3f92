"""`vllm-int8kv eval` on the real model, at a small scale, and its messages for bad input.

Bounds leave room around what README's table has for more tokens: KL 1.9e-4 for int8_custom, 2.9e-2 for fp8.
"""

import json
import os
import re
from dataclasses import asdict
from io import StringIO
from types import SimpleNamespace

import pytest
import tiny_models
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from vllm_int8kv.cache import library
from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.commands import cli, models, terminal
from vllm_int8kv.config import KV_CACHE_DTYPE, read_layer_policy
from vllm_int8kv.evaluation import engine_options, eval_plan, evaluate, sensitivity
from vllm_int8kv.evaluation.cache_spec import CacheSpec
from vllm_int8kv.evaluation.demo import TEXT
from vllm_int8kv.evaluation.engines.process import EngineError
from vllm_int8kv.evaluation.eval_plan import PATHS, EvalPlan
from vllm_int8kv.evaluation.evaluate import first_divergence
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
def test_eval_of_the_shortest_texts(tmp_path, monkeypatch):
    """Below the parts that decode side by side, a chunk, the stride and the prompt of an answer."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nine, two, report_file = tmp_path / "nine.txt", tmp_path / "two.txt", tmp_path / "report.json"
    nine.write_text("one two three four five six seven eight nine")
    two.write_text("one two")
    sizes = ["--tokens", "9", "--generate-tokens", "4", "--needle-lengths", "80", "--dtypes", "auto"]
    options = ["--text", str(nine), "--text", str(two), *sizes, "--json", str(report_file)]
    # As in a file; the workers of xdist say in COLUMNS that they are a terminal of 80.
    monkeypatch.setattr(terminal.console, "width", terminal.LOG_WIDTH)
    result = runner.invoke(cli.app, ["eval", "smollm2", *options])
    assert result.exit_code == 0, result.output
    report = json.loads(report_file.read_text())
    assert list(report["text_tokens"].values()) == [9, 2]
    paths = report["caches"]["auto"]["paths"]
    assert {path: paths[path]["num_tokens"] for path in PATHS} == {"decode": 9, "prefill": 9, "chunked": 9, "prefix": 2}
    assert all(paths[path]["kl_per_token"]["value"] < 1e-6 for path in PATHS)
    assert report["caches"]["auto"]["first_divergence"]["positions"] == [None], "all of the texts is one prompt"
    assert "every 16th token, the last of a shorter text" in " ".join(result.output.split())
    assert "…" not in result.output, "a number is cut off"


@pytest.mark.engine
@pytest.mark.parametrize("sensitivity", [[], ["--sensitivity"]], ids=["eval", "sensitivity"])
def test_eval_refuses_a_text_of_one_token(tmp_path, monkeypatch, sensitivity):
    """How many tokens there are is known in the engine; what it says arrives as one line."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "one.txt"
    text.write_text("one")
    result = runner.invoke(cli.app, ["eval", "smollm2", *sensitivity, "--text", str(text), "--needle-lengths", ""])
    assert result.exit_code == 1
    *progress, error = result.stderr.splitlines()
    assert error == f"Error: --text: {text} has 1 token(s), scoring needs 2: the first has no score"
    assert [line.partition(":")[0] for line in progress] == ["sensitivity" if sensitivity else "auto"] * len(progress)


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
    plan = eval_plan.make_plan([], **options, max_tokens=24, num_samples=1, generate_tokens=0)
    larger, too_small = f"auto:kv_cache_memory_bytes={2**28}", "auto:kv_cache_memory_bytes=1000"
    caches, quiet = [CacheSpec.parse(name, "--dtypes") for name in (larger, too_small)], Console(quiet=True)
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
        evaluate.evaluate(EvalPlan("model"), [CacheSpec("fp8", "fp8")], Console(quiet=True), name="model")
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
    assert set(read_layer_policy(policy, 30, FORMATS)) == set(range(30))
    assert plot.stat().st_size > 0


@pytest.mark.engine
def test_sensitivity_shows_layers_that_read_the_cache_of_another(tmp_path, monkeypatch):
    """Gemma-3n's last two: not ranked, and not in the policy, as they have no cache to leave unquantized."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tokens = torch.randint(3, tiny_models.VOCAB_SIZE, (40,)).tolist()
    options = {"engine_options": {"skip_tokenizer_init": True}, "max_tokens": 64}
    plan = EvalPlan(str(tiny_models.gemma3n(tmp_path)), token_ids=[tokens, [3, 4]], **options)
    report = sensitivity.measure_layers(plan, Console(quiet=True), name="gemma3n")
    assert sorted(layer["layer"] for layer in report["layers"]) == [0, 1, 2]
    # vLLM goes by place: layers that slide read the last cache but one, the others the last.
    assert report["sharing_layers"] == [{"layer": 3, "reads_cache_of": 1}, {"layer": 4, "reads_cache_of": 2}]
    assert report["text_tokens"] == [40, 2]
    policy = tmp_path / "policy.yaml"
    sensitivity.write_policy(report, policy)
    assert set(read_layer_policy(policy, 5, FORMATS)) == {0, 1, 2}
    shown = StringIO()
    sensitivity.print_layers(report, Console(file=shown, width=120))
    assert "reads the cache of layer 2" in shown.getvalue()


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
            "--dtypes int8_custom:rotate_keys: expected OPTION=VALUE after int8_custom:, got 'rotate_keys'",
        ),
        (["--dtypes", "int8_custom:rotate=true"], "has no option 'rotate'"),
        (["--dtypes", "int8_custom:format=k3v4"], "--dtypes int8_custom:format=k3v4: format must be one of k8v8, "),
        (["--paths", "decode,verify"], "--paths must be some of decode, prefill, chunked, prefix, got 'verify'"),
        (["--dtypes", "auto,int8_costum"], "--dtypes: expected some of auto, bfloat16, float16, fp8, "),
        (["--dtypes", "auto,,fp8"], ", turboquant_k8v4, ultraquant_4bit, got ''"),
        (["--dtypes", "fp8:block_size=["], "--dtypes fp8:block_size=[: the value of block_size must be YAML, got '['"),
        (["--dtypes", "fp8:foo=1"], "--dtypes fp8:foo=1: vLLM's LLM has no argument 'foo'"),
        (
            ["--dtypes", "fp8:calculate_kv_scales=true"],
            "--dtypes fp8:calculate_kv_scales=true: vLLM's LLM has no argument 'calculate_kv_scales'",
        ),
        (["--dtypes", "auto:dtype=half"], "--dtypes auto:dtype=half: dtype cannot be set here; use --dtype"),
        (["--dtypes", "int8_custom:layer_policy=/no/such.yaml"], "/no/such.yaml cannot be read"),
        (
            ["--dtypes", "int8_custom:cpu_isa=sse9"],
            f"cpu_isa=sse9: cpu_isa must be one of {', '.join(library.cpu_isas())} on this CPU, got 'sse9'",
        ),
        (["--needle-lengths", "1k"], "--needle-lengths must be numbers of tokens like 512,1024, got '1k'"),
        (["--needle-lengths", "512,64"], "--needle-lengths must be above 64, which hidden number, question and answer"),
        (["--engine-options", "[]"], "--engine-options must be a JSON object, got '[]'"),
        (
            ["--engine-options", '{"kv_cache_dtype": "fp8"}'],
            "--engine-options: kv_cache_dtype cannot be set here; use --dtypes",
        ),
        (["--engine-options", '{"max_model_len": 99}'], "max_model_len cannot be set here; use --tokens"),
        (
            ["--engine-options", '{"enforce_eagre": false}'],
            "--engine-options: vLLM's LLM has no argument 'enforce_eagre'; did you mean enforce_eager?",
        ),
        (["--text", "/no/such/file"], "--text: cannot read /no/such/file"),
        (["--text", os.devnull], f"--text: {os.devnull} holds no text; scoring needs 2 tokens"),
        (["--sensitivity", "--text", os.devnull], f"--text: {os.devnull} holds no text; scoring needs 2 tokens"),
        (["--json", "/"], "--json: expected a file, / is a folder"),
        (["--json", "/no/such/folder/report.json"], "--json: the folder /no/such/folder does not exist"),
        (["--plot", "plot.png"], "--plot needs --sensitivity"),
    ],
)
def test_eval_refuses_bad_options(options, message, monkeypatch):
    monkeypatch.setattr(models, "resolve", lambda model, say: model)
    for module, name in ((evaluate, "evaluate"), (sensitivity, "measure_layers")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("started"))
    result = runner.invoke(cli.app, ["eval", "some/model", *options])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ") and message in result.stderr


def test_eval_refuses_a_plot_without_matplotlib(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    result = runner.invoke(cli.app, ["eval", "some/model", "--sensitivity", "--plot", "plot.png"])
    assert result.stderr.startswith("Error: --plot needs matplotlib, which is not installed")


def test_names_that_an_engine_knows_are_those_of_this_vllm():
    from dataclasses import fields
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.engine.arg_utils import EngineArgs

    assert engine_options.cache_dtypes() == {*get_args(CacheDType)} - {
        KV_CACHE_DTYPE
    }  # which the plugin may have added
    assert engine_options.engine_arguments() == {field.name for field in fields(EngineArgs)}
    assert set(engine_options.OWN) <= engine_options.engine_arguments()


def test_every_option_of_a_cache_that_help_names_exists():
    options = typer.main.get_command(cli.app).commands["eval"].params
    (shown,) = (option.help for option in options if option.name == "dtypes")
    named = re.findall(r"(\w+):(\w+=\w+)", shown)
    assert [dtype for dtype, _ in named] == ["int8_custom", "fp8"]
    for dtype, option in named:
        CacheSpec.parse(f"{dtype}:{option}", "--dtypes")


def test_sizes_that_a_text_is_too_short_for():
    """Of three texts: longer than a chunk and the stride, as long as them, and of the fewest tokens."""
    plan = EvalPlan("model", chunk_tokens=10, prefix_stride=10, token_ids=[[0] * 25, [0] * 10, [0] * 2])
    assert plan.chunks() == [10, 5, 1]
    assert plan.strides("prefix") == [10, 9, 1]
    assert plan.strides("chunked") == [1, 1, 1]
    assert plan.text_problem(plan.token_ids) is None
    named = EvalPlan("model", texts=("a", ""), text_names=("book.txt", "note.txt"))
    assert (
        named.text_problem([[0, 1], [0]]) == "--text: note.txt has 1 token(s), scoring needs 2: the first has no score"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"must hold a mapping of layers to int8 or auto, got \[1\]"),
        ("7: auto", "names layer 7; the model has layers 0 to 3"),
        ("true: auto", "names layer True; layers are numbers from 0 on"),
        ("-1: auto", "names layer -1; layers are numbers"),
        ("'\u00b2': auto", "names layer '\u00b2'; layers are numbers"),  # a digit, but no number for Python
        ("1.0: auto", "names layer 1.0; layers are numbers"),
        ("1: auto\n1: int8", "key 1 is given twice"),
        ('{"1": "auto", "1": "int8"}', "key '1' is given twice"),
        ('{"1": "auto", 1: "int8"}', "names layer 1 twice"),
        ("1: fp8", "gives layer 1 the format 'fp8'; use int8 or auto"),
        ("{", "cannot be read"),
    ],
)
def test_layer_policy_refuses(text, message, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_layer_policy(path, 4)


def test_layer_policy_in_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "policy.yaml").write_text("7: auto")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_layer_policy("~/policy.yaml") == {7: "auto"}  # of a model that is not known yet


def test_layer_policy_as_json(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"0": "auto", "2": "int8"}')
    assert read_layer_policy(path, 4) == {0: "auto", 2: "k8v8"}

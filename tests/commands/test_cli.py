"""The command line: doctor, the messages for bad input, and the whole demo on a tiny scale."""

import importlib
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_int8kv.cache import library, ops
from vllm_int8kv.commands import cli, doctor, models
from vllm_int8kv.evaluation import demo, machine

runner = CliRunner()


def test_doctor_finds_nothing_wrong():
    result = runner.invoke(cli.app, ["doctor", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["ok"], report
    names = [check["name"] for check in report["checks"]]
    kernels = [name.split()[2] for name in names if name.startswith("CPU kernels, ")]
    assert kernels == library.cpu_isas()
    assert {"torch", "operators", "vllm", "plugin"} <= set(names)
    assert ("bf16" in names) == (not machine.has_fast_bf16())


def test_doctor_leaves_the_kernel_path_alone():
    before = library.cpu_isa()
    assert all(check.ok for check in doctor.check_kernels())
    assert library.cpu_isa() == before


def test_doctor_finds_wrong_kernels(monkeypatch):
    def halved(query, *args, **options):
        return query / 2

    monkeypatch.setattr(ops, "paged_attention", halved)
    monkeypatch.setattr(doctor, "check_plugin", lambda: doctor.Check("plugin", "not asked"))
    result = runner.invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "paged_attention: differs from the reference by" in result.stdout
    assert "report this with the output of" in result.stdout


def test_doctor_finds_a_wrong_cache(monkeypatch):
    monkeypatch.setattr(ops, "reshape_and_cache", lambda *args, **kwargs: None)
    (first, *_) = doctor.check_kernels()
    assert "bytes of the cache differ from the reference" in first.found and first.remedy


def test_doctor_finds_a_filtered_plugin(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    check = doctor.check_plugin()
    assert check.found == "left out by VLLM_PLUGINS='another'"
    assert check.remedy == "add int8kv to VLLM_PLUGINS, or unset it"


def test_doctor_finds_a_refusing_vllm(monkeypatch):
    monkeypatch.setattr(doctor, "PLUGIN_CHECK", "raise ValueError('no such dtype')")
    check = doctor.check_plugin()
    assert check.found == "vLLM refuses kv_cache_dtype='int8_custom': ValueError: no such dtype" and check.remedy


def test_doctor_finds_no_vllm(monkeypatch):
    monkeypatch.setattr(machine, "VLLM_DISTRIBUTIONS", ("no-such-vllm",))
    check = doctor.check_vllm()
    assert (check.found, check.ok) == ("not installed", False)


def test_doctor_names_the_distribution_of_vllm():
    assert re.fullmatch(r"0\.3\d\.\d+ \(distribution vllm(-cpu)?\)", doctor.check_vllm().found)


def test_doctor_shows_what_is_cheap_to_know_before_it_imports_pytorch(tmp_path):
    """Line by line, into a pipe as well."""
    fake = "import pathlib, time\npathlib.Path({!r}).touch()\ntime.sleep(600)\n"
    (tmp_path / "torch.py").write_text(fake.format(str(tmp_path / "imported")))
    command = [sys.executable, "-m", "vllm_int8kv.commands.cli", "doctor"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            lines = [process.stdout.readline() for _ in range(4)]
        finally:
            process.kill()
        assert process.stdout.read() == ""
    assert [line.split()[1] for line in lines] == ["python:", "vllm-int8kv:", "torch:", "vllm:"]


def test_doctor_says_why_pytorch_cannot_be_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    command = [sys.executable, "-m", "vllm_int8kv.commands.cli", "doctor"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stderr
    expected = "FAIL import torch: fails: libtorch_cpu.so: cannot open shared object file"
    assert done.stdout.splitlines()[-2:] == [expected, "     install PyTorch 2.11 to 2.14"]


def test_doctor_imports_vllm_in_another_process_only():
    code = """
import sys
from vllm_int8kv.commands import doctor
doctor.check_plugin = lambda: doctor.Check("plugin", "not asked")
names = [check.name for check in doctor.diagnose()]
print(names[-1], {"vllm", "transformers"} & set(sys.modules))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "plugin set()\n"


def test_doctor_finds_a_broken_torchvision(tmp_path):
    """As it is with a CUDA build of torchvision next to a CPU PyTorch."""
    message = "operator torchvision::nms does not exist"
    tmp_path.joinpath("torchvision.py").write_text(f"raise RuntimeError({message!r})")
    code = "from vllm_int8kv.commands import doctor; check = doctor.check_torchvision(); print(check.found, check.ok)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout == f"does not fit this PyTorch: {message} False\n"


def test_light_imports():
    """Help must not wait for PyTorch and vLLM."""
    code = "import sys, vllm_int8kv.commands.cli; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"


@pytest.mark.parametrize("args, exit_code", [(["serve", "--help"], 0), (["serve"], 2)])
def test_serve_help(args, exit_code):
    result = runner.invoke(cli.app, args)
    assert result.exit_code == exit_code
    assert "vllm-int8kv serve --help=all" in " ".join(result.stdout.split())


@pytest.fixture
def served(monkeypatch) -> list[Namespace]:
    """The options with which a server would have started."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    options: list[Namespace] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(options.append))
    return options


def test_serve_sets_the_dtype_and_passes_options_on(served):
    assert (
        runner.invoke(cli.app, ["serve", "some/model", "--port", "1234", "--max_model_len=99", "-tp", "2"]).exit_code
        == 0
    )
    (options,) = served
    assert (options.model_tag, options.served_model_name) == ("some/model", None)
    assert (options.port, options.max_model_len, options.tensor_parallel_size) == (1234, 99, 2)
    assert options.kv_cache_dtype == "int8_custom"


def test_serve_of_the_embedded_model(served):
    assert runner.invoke(cli.app, ["serve", "smollm2"]).exit_code == 0
    assert runner.invoke(cli.app, ["serve", "smollm2", "--served-model-name", "small"]).exit_code == 0
    assert [options.model_tag for options in served] == [str(models.smollm2())] * 2
    assert [options.served_model_name for options in served] == [["smollm2"], ["small"]]


@pytest.mark.parametrize("where", ["option", "config"])
def test_serve_leaves_a_given_dtype_alone(served, tmp_path, where):
    config = tmp_path / "config.yaml"
    config.write_text("kv-cache-dtype: fp8\n")
    args = {"option": ["--kv-cache-dtype", "fp8"], "config": ["--config", str(config)]}[where]
    assert runner.invoke(cli.app, ["serve", "some/model", *args]).exit_code == 0
    assert [options.kv_cache_dtype for options in served] == ["fp8"]


def test_serve_refuses_an_unknown_option(served):
    assert runner.invoke(cli.app, ["serve", "some/model", "--no-such-option"]).exit_code == 2
    assert not served


def test_serve_with_the_plugin_filtered_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    result = runner.invoke(cli.app, ["serve", "smollm2"])
    assert result.exit_code == 1
    assert result.stderr == "Error: VLLM_PLUGINS='another' leaves out this plugin: add int8kv to it, or unset it\n"


def test_demo_refuses_a_json_file_in_no_folder(tmp_path):
    result = runner.invoke(cli.app, ["demo", "--json", str(tmp_path / "missing" / "report.json")])
    assert result.exit_code == 1
    assert result.stderr == f"Error: --json: the folder {tmp_path / 'missing'} does not exist\n"


def test_demo_shows_the_error_of_an_engine(tmp_path):
    result = runner.invoke(cli.app, ["demo", str(tmp_path / "no-model")])
    assert result.exit_code == 1
    dtype = "auto" if machine.has_fast_bf16() else "float32"
    assert f"Error: the engine with kv_cache_dtype='auto' and dtype='{dtype}' ended with exit code 1" in result.stderr
    assert result.stderr.startswith("auto: load ...\nError: ")
    assert "no-model" in result.stderr.split("Its last lines:")[1]


@pytest.mark.engine
def test_demo_on_a_tiny_scale(capsys, monkeypatch):
    """All engines and the report, with a short text and context."""
    # Threads of a pool wait for one another; on a busy machine that takes longer than the work.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = demo.DemoPlan(
        str(models.smollm2()),
        prompts=demo.PROMPTS[:1],
        answer_tokens=12,
        text=demo.TEXT.read_text()[:600],
        num_seqs=2,
        context_len=256,
        decode_steps=4,
    )
    log = StringIO()
    report = demo.run_demo(plan, Console(file=log), name="smollm2")

    begun = re.findall(r"^(.+) \.\.\.$", log.getvalue(), flags=re.MULTILINE)
    assert begun[0] == "auto: load" and {"auto: decode", "int8_custom: decode"} < set(begun)
    assert re.findall(r"^(.+), \d+ s$", log.getvalue(), flags=re.MULTILINE) == begun
    assert report["model"] == "smollm2"
    (answers,) = report["prompts"]
    assert answers["prompt"] == demo.PROMPTS[0]
    assert "Paris" in answers["auto"] and "Paris" in answers["int8_custom"]
    tokens, speed = report["kv_cache_tokens"], report["decode_tok_per_s"]
    assert report["capacity_ratio"] == tokens["int8_custom"] / tokens["auto"] > 1.8, "few blocks, hence not 1.94"
    assert 0 < report["kl_per_token"] < 2e-3
    assert 0.9 < report["top1_agreement"] <= 1
    assert speed["auto"] > 0 and speed["int8_custom"] > 0
    assert report["dtype"] == ("bfloat16" if machine.has_fast_bf16() else "float32")
    assert report["context_len"] == 256
    assert json.loads(json.dumps(report)) == report

    cli.print_demo(report)
    shown = capsys.readouterr().out
    assert "capital of France" in shown and f"{report['capacity_ratio']:.2f}x" in shown


@pytest.mark.parametrize(
    ("dtype", "has_fast_bf16", "engines"),
    [
        ("auto", True, [("auto", "answer decode"), ("float32", "text")]),
        ("bfloat16", False, [("bfloat16", "answer decode"), ("float32", "text")]),
        ("auto", False, [("float32", "answer text decode")]),
        ("float32", True, [("float32", "answer text decode")]),
    ],
)
def test_engines_of_the_demo(dtype, has_fast_bf16, engines, monkeypatch):
    """The text is scored in fp32; engines that would have the same dtype are one."""
    monkeypatch.setattr(demo, "has_fast_bf16", lambda: has_fast_bf16)
    plans = demo.make_plans(demo.DemoPlan("model", dtype=dtype), "/folder")
    assert [(plan.dtype, plan.kv_cache_dtype, " ".join(plan.stages())) for plan in plans] == [
        (dtype, kv_cache_dtype, f"load {stages}") for dtype, stages in engines for kv_cache_dtype in demo.DTYPES
    ]
    assert [plan.is_reference for plan in plans if plan.text] == [True, False]
    assert len({plan.scores_path for plan in plans if plan.text}) == 2


@pytest.mark.parametrize(
    ("seconds_per_prompt", "longest", "context_len"),
    [(0.5, 4096, 4096), (5.0, 4096, 1280), (100.0, 4096, 256), (100.0, 1000, 1000)],
)
def test_contexts_of_the_demo_are_as_long_as_there_is_time_for(monkeypatch, seconds_per_prompt, longest, context_len):
    """50 seconds for eight sequences; one prompt of 1,024 tokens is timed, if contexts are longer than that."""
    demo_engine = importlib.import_module("vllm_int8kv.evaluation.engines.demo_engine")
    now, prompts = [0.0], []

    class Engine:
        def generate(self, prompt, params, use_tqdm):
            prompts.append(len(prompt["prompt_token_ids"]))
            now[0] += seconds_per_prompt

    monkeypatch.setattr(demo_engine.time, "perf_counter", lambda: now[0])
    found = demo_engine.choose_context(Engine(), demo.DemoPlan("model"), longest, vocab_size=1000)
    assert found == context_len
    assert prompts == ([1024] if longest > 1024 else [])


def test_text_of_the_demo_is_long_enough():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(models.smollm2()) / "tokenizer.json"))
    assert len(tokenizer.encode(demo.TEXT.read_text()).ids) >= 1500

"""The command line: doctor, serve, and their messages for bad input."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace

import pytest
from typer.testing import CliRunner

from vllm_int8kv.cache import library, ops
from vllm_int8kv.commands import cli, doctor, models
from vllm_int8kv.evaluation import machine

runner = CliRunner()
K6V4 = "int8_custom:format=k6v4"


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


@pytest.mark.parametrize(
    "args",
    [
        ["--kv-cache-dtype", K6V4],
        [f"--kv-cache-dtype={K6V4}"],
        ["--kv_cache_dtype", K6V4],
        ["--kv-cache-dtype", "int8_custom", "--kv-cache-dtype", K6V4],
        ["--config", "CONFIG"],
        ["--config", "CONFIG", "--additional-config", '{"int8_kv": {"format": "k6v4"}}'],
    ],
)
def test_serve_takes_options_of_the_cache(served, tmp_path, args):
    config = tmp_path / "config.yaml"
    config.write_text(f"kv-cache-dtype: {K6V4}\n")
    args = [str(config) if arg == "CONFIG" else arg for arg in args]
    result = runner.invoke(cli.app, ["serve", "some/model", *args])
    assert result.exit_code == 0, result.output
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = AsyncEngineArgs.from_cli_args(served[0])
    assert arguments.kv_cache_dtype == "int8_custom"
    assert arguments.additional_config == {"int8_kv": {"format": "k6v4"}}


def test_serve_follows_a_layer_policy_beside_other_options(served, tmp_path):
    policy = tmp_path / "policy.yaml"
    policy.write_text("{0: auto, 3: k4v4}")
    others = ["--additional-config", '{"another": 1}', "--additional-config.int8_kv.rotate_keys", "false"]
    for args in ([], others[:2], others[2:]):
        dtype = f"int8_custom:layer_policy={policy}"
        assert runner.invoke(cli.app, ["serve", "some/model", "--kv-cache-dtype", dtype, *args]).exit_code == 0
    found = {"layer_policy": {0: "auto", 3: "k4v4"}}
    assert [options.additional_config for options in served] == [
        {"int8_kv": found},
        {"another": 1, "int8_kv": found},
        {"int8_kv": {"rotate_keys": False, **found}},
    ]


def test_serve_forgets_the_options_of_a_dtype_that_another_one_replaces(served, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"kv-cache-dtype: {K6V4}\n")
    args = ["serve", "some/model", "--config", str(config), "--kv-cache-dtype", "int8_custom"]
    assert runner.invoke(cli.app, args).exit_code == 0
    assert (served[0].kv_cache_dtype, served[0].additional_config) == ("int8_custom", {})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["int8_custom:format=k3v4"], "--kv-cache-dtype int8_custom:format=k3v4: format must be one of k8v8, "),
        (["int8_custom:k6v4"], "--kv-cache-dtype int8_custom:k6v4: expected OPTION=VALUE after int8_custom:, got"),
        (["fp8:block_size=64"], "--kv-cache-dtype fp8:block_size=64: only int8_custom takes options here; use"),
        (
            [K6V4, "--additional-config", '{"int8_kv": {"format": "k8v8"}}'],
            f"{K6V4} sets format, and additional_config[\"int8_kv\"] sets it to 'k8v8': leave out one of the two",
        ),
    ],
)
def test_serve_refuses_wrong_options_of_the_cache(served, args, message):
    result = runner.invoke(cli.app, ["serve", "some/model", "--kv-cache-dtype", *args])
    assert result.exit_code == 1 and not served
    assert result.stderr.startswith(f"Error: {message}")


def test_serve_leaves_a_wrong_dtype_to_vllm(served):
    result = runner.invoke(cli.app, ["serve", "some/model", "--kv-cache-dtype", "int8_costum:format=k6v4"])
    assert result.exit_code == 2 and not served
    assert "argument --kv-cache-dtype: invalid choice: 'int8_costum'" in result.stderr


def test_serve_refuses_an_unknown_option(served):
    assert runner.invoke(cli.app, ["serve", "some/model", "--no-such-option"]).exit_code == 2
    assert not served


def test_serve_with_the_plugin_filtered_out(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    result = runner.invoke(cli.app, ["serve", "smollm2"])
    assert result.exit_code == 1
    assert result.stderr == "Error: VLLM_PLUGINS='another' leaves out this plugin: add int8kv to it, or unset it\n"

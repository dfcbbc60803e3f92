"""`vllm-int8kv store` and `serve --kv-store`."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_int8kv.commands import cli, terminal
from vllm_int8kv.store import files
from vllm_int8kv.store.files import Header
from vllm_int8kv.store.namespace import write_description

runner = CliRunner()
HEADER = Header("a" * 32, "00ff", "k6v4", 1000)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two namespaces, three blocks, one file that was not written to its end."""
    for number in range(2):
        files.write(tmp_path, replace(HEADER, block=f"0{number}ff"), [bytes(1000)])
    files.write(tmp_path, replace(HEADER, namespace="b" * 32, codec="exact"), [bytes(1000)])
    shown = {"model": "some/model", "codec": "k6v4", "formats": "30 x k8v8", "block_size": 128, "rank": "0 of 1"}
    write_description(tmp_path / ("a" * 32), shown)
    (tmp_path / ("b" * 32) / "00" / f".x{files.TEMPORARY_SUFFIX}").write_bytes(b"half")
    return tmp_path


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """As in a file; the workers of xdist say in COLUMNS that they are a terminal of 80."""
    monkeypatch.setattr(terminal.console, "width", terminal.LOG_WIDTH)


def run(*arguments, exit_code=0) -> str:
    result = runner.invoke(cli.app, ["store", *map(str, arguments)])
    assert result.exit_code == exit_code, result.output
    return result.output


def test_ls_says_whose_blocks_they_are(folder):
    found = {own["name"][0]: own for own in json.loads(run("ls", folder, "--json"))}
    size = files.path_of(folder, HEADER.namespace, "00ff").stat().st_size
    assert (found["a"]["model"], found["a"]["codec"], found["a"]["num_files"]) == ("some/model", "k6v4", 2)
    assert found["a"]["num_bytes"] == 2 * size and found["a"]["unfinished"] == []
    assert (found["b"]["model"], found["b"]["num_files"], len(found["b"]["unfinished"])) == ("?", 1, 1)
    shown = run("ls", folder)
    assert "some/model" in shown and "30 x k8v8" in shown and "aaaaaaaaaaaa" in shown


def test_stat_counts_everything(folder):
    found = json.loads(run("stat", folder, "--json"))
    assert (found["namespaces"], found["blocks"], found["tokens"], found["unfinished"]) == (2, 3, 256, 1)
    assert "blocks: 3" in run("stat", folder)


def test_verify_finds_what_is_bad(folder):
    assert "3 files, 0 bad" in run("verify", folder)
    path, other = (files.path_of(folder, HEADER.namespace, block) for block in ("00ff", "01ff"))
    path.write_bytes(path.read_bytes()[:-1])
    output = run("verify", folder, exit_code=1)
    assert "3 files, 1 bad" in output and "00ff.kv: it has" in output.replace("\n", "")
    other.write_bytes(files.path_of(folder, "b" * 32, "00ff").read_bytes())
    assert "it is the file of another block" in run("verify", folder, exit_code=1)
    assert "3 files, 2 bad, removed" in run("verify", folder, "--remove", exit_code=1)
    assert "1 files, 0 bad" in run("verify", folder) and not path.exists()


def test_gc_removes_what_was_used_longest_ago(folder):
    paths = [files.path_of(folder, HEADER.namespace, block) for block in ("00ff", "01ff")]
    os.utime(paths[0], (1000, 1000))
    size = paths[0].stat().st_size
    assert "1 files removed" in run("gc", folder, "--max-bytes", int(2.5 * size))
    assert not paths[0].exists() and paths[1].exists()


@pytest.mark.parametrize("command", ["ls", "stat", "verify"])
def test_a_folder_that_does_not_exist_is_said(command, tmp_path):
    assert "no/such is no folder" in run(command, tmp_path / "no/such", exit_code=1).replace("\n", "")


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("/some/folder", {"path": "/some/folder"}),
        ("/some/folder:codec=bound:0.1", {"path": "/some/folder", "codec": "bound:0.1"}),
        (
            "/some/folder:codec=k6v4+zstd:max_bytes=50_000_000_000",
            {"path": "/some/folder", "codec": "k6v4+zstd", "max_bytes": 50_000_000_000},
        ),
    ],
)
def test_serve_takes_a_store(spelled, expected):
    from vllm_int8kv.commands.serve import parse

    _, options = parse(["some/model", "--kv-store", spelled])
    config = options.kv_transfer_config
    assert config.kv_connector_extra_config == expected and config.kv_role == "kv_both"
    assert (config.kv_connector, config.kv_connector_module_path) == ("KVStoreConnector", "vllm_int8kv.store")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--kv-store", "/x:codec"], r"--kv-store /x:codec: expected OPTION=VALUE after /x:, got 'codec'"),
        (["--kv-store", "/x:codec=zip"], r"--kv-store /x:codec=zip: codec must be exact"),
        (["--kv-store", "/x:size=3"], r"has no option 'size'"),
        (
            ["--kv-store", "/x", "--kv-transfer-config", '{"kv_connector": "X", "kv_role": "kv_both"}'],
            r"--kv-store and --kv-transfer-config: an engine has one connector; give one",
        ),
    ],
)
def test_serve_refuses_a_store_in_words(arguments, problem):
    from vllm_int8kv.commands.serve import parse

    with pytest.raises(ValueError, match=problem):
        parse(["some/model", *arguments])

"""What the READMEs name exists: paths, make targets, commands, and code that compiles."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path: (ROOT / path).read_text() for path in ("README.md", "benchmarks/README.md")}
README = PAGES["README.md"]
BLOCKS = [
    block
    for page in PAGES.values()
    for block in re.findall(r"^```(\w*)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
]
PROSE = [re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL) for page in PAGES.values()]
SPANS = [span for text in PROSE for span in re.findall(r"`([^`\n]+)`", text)]
CODE = [*SPANS, *(text for _, text in BLOCKS)]
PYTHON = [text for language, text in BLOCKS if language == "python"]


def tracked_files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.splitlines()


def named_paths():
    """Targets of relative links, and words of code that begin like a path of this repository."""
    targets = []
    for path, page in PAGES.items():
        links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page)
        images = re.findall(r'<img[^>]*src="(?!https?:)([^"]+)"', page)
        targets += [str((ROOT / path).parent.joinpath(target).resolve().relative_to(ROOT)) for target in links + images]
    top = {path.split("/")[0] for path in tracked_files()}
    words = {word.strip("'\"():,") for text in CODE for word in text.split()}
    paths = {word for word in words if re.fullmatch(r"[\w.-]+/[\w./-]*", word) and word.split("/")[0] in top}
    files = {word for word in words if re.fullmatch(r"[\w-]+\.(py|md|h|cpp|cu|cuh|toml|yaml|lock|txt)", word)}
    return sorted({*targets, *paths, *files})


@pytest.mark.parametrize("path", named_paths())
def test_named_path_exists(path):
    by_name = {Path(tracked).name for tracked in tracked_files()}
    assert (ROOT / path).exists() or path in by_name, f"a README names {path}, which does not exist"


def test_some_paths_are_named():
    assert named_paths()


def test_named_make_targets_exist():
    named = {target for text in CODE for target in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_named_commands_exist():
    from vllm_int8kv.commands.cli import app

    named = {command for text in CODE for command in re.findall(r"\bvllm-int8kv ([a-z][\w-]*)", text)}
    assert {"doctor", "serve"} <= named
    assert named <= set(typer.main.get_command(app).commands)


@pytest.mark.parametrize("source", PYTHON)
def test_python_compiles(source):
    ast.parse(source)


def test_example_asks_for_the_int8_cache():
    calls = [node for source in PYTHON for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    engines = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "LLM"]
    dtypes = {
        ast.literal_eval(keyword.value)
        for call in engines
        for keyword in call.keywords
        if keyword.arg == "kv_cache_dtype"
    }
    assert "int8_custom" in dtypes


def test_first_command_is_near_the_top():
    before, _, _ = README.partition("```")
    assert before.count("\n") < 20

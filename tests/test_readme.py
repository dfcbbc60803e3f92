"""What the pages name exists: paths, headings, make targets, commands, options, and code that compiles."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import typer

from vllm_int8kv.config import Int8KVConfig

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("README.md", "benchmarks/README.md", "tests/README.md", "CONTRIBUTING.md", "CHANGELOG.md")
PAGES = {path: (ROOT / path).read_text() for path in NAMES}
README = PAGES["README.md"]
MAX_README_LINES = 220
FIRST_COMMAND_BY_LINE = 15
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
    assert (ROOT / path).exists() or path in by_name, f"a page names {path}, which does not exist"


def test_some_paths_are_named():
    assert named_paths()


def heading_anchors(page):
    """Anchors of a page's headings as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked_headings():
    for path, page in PAGES.items():
        for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#([^)\s]+)\)", page):
            linked = (ROOT / path).parent.joinpath(target).resolve() if target else ROOT / path
            yield pytest.param(linked.relative_to(ROOT), anchor, id=f"{path} to {target}#{anchor}")


@pytest.mark.parametrize(("path", "anchor"), linked_headings())
def test_linked_heading_exists(path, anchor):
    assert anchor in heading_anchors((ROOT / path).read_text())


def test_named_make_targets_exist():
    named = {target for text in CODE for target in re.findall(r"\bmake ([a-z][\w-]*)", text)}
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_named_commands_exist():
    from vllm_int8kv.commands.cli import app

    named = {command for text in CODE for command in re.findall(r"\bvllm-int8kv ([a-z][\w-]*)", text)}
    assert {"bench", "doctor", "eval", "serve"} <= named
    assert named <= set(typer.main.get_command(app).commands)


def test_named_modules_exist():
    named = {module for text in CODE for module in re.findall(r"\bpython -m (benchmarks[\w.]*)", text)}
    assert {"benchmarks.operators", "benchmarks.report"} <= named
    for module in named:
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").exists() or path.with_suffix(".py").exists(), f"a page names {module}"


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


def test_options_are_those_of_the_configuration():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| `([^`]+)` \|", section(README, "Options"), flags=re.MULTILINE)
    options = [(field.name, type_text(field), repr(field.default)) for field in dataclasses.fields(Int8KVConfig)]
    assert sorted(rows) == sorted(options)


def type_text(field: dataclasses.Field) -> str:
    """The type of an option in a cell of a table, where a bare | would end it."""
    named = field.type.__name__ if isinstance(field.type, type) else str(field.type).removesuffix(" | None")
    return named.replace(" | ", " \\| ")


def section(page, heading):
    """What stands below a heading, up to the next one."""
    return re.split(rf"^#+ {heading}$", page, flags=re.MULTILINE)[1].partition("\n#")[0]


def test_readme_is_short():
    assert len(README.splitlines()) <= MAX_README_LINES


def test_first_command_is_near_the_top():
    before, _, after = README.partition("```")
    assert after.startswith("sh\n")
    assert before.count("\n") + 2 <= FIRST_COMMAND_BY_LINE, "the line below the fence"

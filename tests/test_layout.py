"""The map of the repository: rooms of a readable size, arrows that point one way, vLLM and Torch where they belong.

CONTRIBUTING.md draws the map.
"""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILES = 12
SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")

ROOMS = {
    "vllm_int8kv": {"config": (), "cache": (), "serving": ("config", "cache"), "store": ("config", "cache")}
    | {"evaluation": ("config", "cache"), "commands": ("config", "cache", "store", "evaluation")},
    "csrc": {"format": (), "cpu": ("format",), "cuda": ("format",), "ladder": ("format", "cpu", "cuda")}
    | {"store": ("format", "cpu"), "ops": ("format", "cpu", "cuda", "ladder", "store")},
}
"""What the files of a room may use beside their own room."""

VLLM_ROOMS = ("vllm_int8kv/serving/", "vllm_int8kv/store/engine/", "vllm_int8kv/evaluation/engines/")
VLLM_MODULES = {f"benchmarks/{name}.py" for name in ("engines/engine", "engines/store_engine", "operators/cpu_peers")}
"""What may import vLLM when it is imported itself; of `benchmarks` the modules that run an engine or vLLM's kernels."""


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return [path for line in listed.stdout.splitlines() if (path := Path(line)) and (ROOT / path).is_file()]


PYTHON = tracked("vllm_int8kv/*.py", "benchmarks/*.py")
NAMES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in PYTHON}


def run_when_imported(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, but for the bodies of functions and what is for type checkers only."""
    for child in ast.iter_child_nodes(node):
        is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not is_for_types:
            yield child
            yield from run_when_imported(child)


def imports(path: Path, at_module_level: bool = False) -> Iterator[str]:
    """Every module or `module.name` that a file imports."""
    tree = ast.parse((ROOT / path).read_text())
    for node in run_when_imported(tree) if at_module_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def module_of(name: str) -> str | None:
    """The module of this repository that an imported name is, or is a part of."""
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


def room_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def test_no_folder_holds_more_than_a_dozen_files():
    sizes = Counter(path.parent for path in tracked() if path.suffix in SOURCES)
    assert {str(folder): size for folder, size in sizes.items() if size > MAX_FILES} == {}


def test_no_import_cycle():
    graph = {
        name: {m for target in imports(path) if (m := module_of(target)) and m != name} for name, path in NAMES.items()
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("room", ROOMS["vllm_int8kv"])
def test_python_arrows_point_one_way(room):
    allowed = {room, *ROOMS["vllm_int8kv"][room]}
    for name, path in NAMES.items():
        if path.parts[0] == "vllm_int8kv" and len(path.parts) > 1 and room_of(path) == room:
            used = {room_of(NAMES[m]) for target in imports(path) if (m := module_of(target)) and m != "vllm_int8kv"}
            assert used - allowed == set(), name
            assert not [target for target in imports(path) if target.startswith("benchmarks")], name


def names_of(path: Path) -> set[str]:
    """What a module defines or imports at module level."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        else:
            found |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_what_is_imported_exists(path):
    """Imports inside of functions too, which nothing else may run without a GPU or a cluster."""
    for target in imports(path):
        module, _, name = target.rpartition(".")
        if module in NAMES and target not in NAMES:
            assert name in names_of(NAMES[module]), target


def test_measuring_code_imports_no_reporting_code():
    for name, path in NAMES.items():
        if path.parts[0] == "benchmarks" and path.parts[1] != "report":
            assert not [target for target in imports(path) if target.startswith("benchmarks.report")], name


def test_only_rooms_of_engines_import_vllm_when_imported():
    found = {
        str(path)
        for path in PYTHON
        if any(target.split(".")[0] == "vllm" for target in imports(path, at_module_level=True))
    }
    assert {path for path in found if not path.startswith(VLLM_ROOMS)} == VLLM_MODULES
    assert any(path.startswith(VLLM_ROOMS[0]) for path in found)


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include ["<]([^">]+)[">]', (ROOT / path).read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("room", ROOMS["csrc"])
def test_includes_point_one_way(room):
    files = [path for path in tracked("csrc/*") if path.suffix in SOURCES and room_of(path) == room]
    assert files
    for path in files:
        ours = {target.split("/")[0] for target in includes(path) if (ROOT / "csrc" / target).is_file()}
        assert ours - {room, *ROOMS["csrc"][room]} == set(), path


def test_only_ops_includes_torch():
    with_torch = [path for path in tracked("csrc/*") if any(target.startswith("torch/") for target in includes(path))]
    assert with_torch and {room_of(path) for path in with_torch} == {"ops"}

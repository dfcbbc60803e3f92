"""The plugin beside other plugins, selections of plugins, kinds of processes; and what it never does."""

import ast
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_int8kv

PACKAGE = Path(vllm_int8kv.__file__).parent
TRY = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import CacheConfig
try:
    print(CacheConfig(cache_dtype="int8_custom").cache_dtype)
except ValueError:
    print("refused")
"""
OTHER_PLUGIN = """
def widen():
    import sys, typing, torch, vllm.config.cache as cache
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, VllmConfig
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
    narrow = cache.CacheDType
    wide = typing.Literal[(*typing.get_args(narrow), "other_int4")]
    STR_DTYPE_TO_TORCH_DTYPE["other_int4"] = torch.uint8
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, "CacheDType", None) is narrow:
            module.CacheDType = wide
    CacheConfig.__annotations__["cache_dtype"] = wide
    CacheConfig.__dataclass_fields__["cache_dtype"].type = wide
    CacheConfig.__pydantic_fields__["cache_dtype"].annotation = wide
    rebuild_dataclass(CacheConfig, force=True)
    rebuild_dataclass(VllmConfig, force=True)
import vllm_int8kv
{first}()
{second}()
from vllm.config import CacheConfig
print(CacheConfig(cache_dtype="other_int4").cache_dtype, CacheConfig(cache_dtype="int8_custom").cache_dtype)
"""


def run_python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(("selection", "answer"), [("int8kv", "int8_custom"), ("another", "refused")])
def test_vllm_plugins_selects(selection, answer):
    assert run_python(TRY, VLLM_PLUGINS=selection) == answer


@pytest.mark.parametrize("order", [("widen", "vllm_int8kv.register"), ("vllm_int8kv.register", "widen")])
def test_two_plugins_that_add_a_dtype(order):
    code = OTHER_PLUGIN.format(first=order[0], second=order[1])
    assert run_python(code) == "other_int4 int8_custom"


def _dtype_of_child(queue: multiprocessing.Queue) -> None:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from vllm.config import CacheConfig

    queue.put(CacheConfig(cache_dtype="int8_custom").cache_dtype)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_forked_and_spawned_workers_know_the_dtype(method):
    vllm_int8kv.register()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_dtype_of_child, args=(queue,))
    child.start()
    assert queue.get(timeout=120) == "int8_custom"
    child.join()
    assert child.exitcode == 0


# Security.


def test_the_package_opens_no_port_and_executes_no_data():
    forbidden = {"socket", "socketserver", "http", "asyncio", "pickle", "cloudpickle", "dill", "marshal", "shelve"}
    # The throughput benchmark loads a server over the network and spreads its engines over a cluster.
    for path in (path for path in PACKAGE.rglob("*.py") if path.parent.name != "bench"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module or "").split(".")[0]]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load"}, path
            assert not forbidden & set(names), f"{path.name} imports {names}"


def test_serve_passes_keys_and_tls_through(monkeypatch):
    from vllm.entrypoints.cli.serve import ServeSubcommand

    from vllm_int8kv.commands.serve import serve

    seen = {}
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(lambda options: seen.update(vars(options))))
    options = ["--api-key", "secret", "--ssl-keyfile", "key.pem", "--ssl-certfile", "cert.pem", "--port", "8443"]
    serve(["some/model", *options])
    assert (seen["api_key"], seen["ssl_keyfile"], seen["ssl_certfile"]) == (["secret"], "key.pem", "cert.pem")
    assert (seen["port"], seen["kv_cache_dtype"]) == (8443, "int8_custom")

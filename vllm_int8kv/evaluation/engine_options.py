"""What is passed on to vLLM's `LLM`, checked before an engine starts.

The names that vLLM knows are read from its source: importing it takes ten seconds and hundreds of megabytes, in a
process that only waits for its engines. A vLLM that does not state them where 0.32 and 0.33 do is asked by its engines.
"""

import ast
import difflib
from collections.abc import Collection, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from vllm_int8kv.config import KV_CACHE_DTYPE

OWN = {
    "model": "name it as the argument MODEL",
    "dtype": "use --dtype",
    "kv_cache_dtype": "use --dtypes",
    "additional_config": "use --dtypes int8_custom:OPTION=VALUE",
    "max_model_len": "use --tokens, --generate-tokens and --needle-lengths",
    "max_num_batched_tokens": "use --chunk-tokens",
    "max_num_scheduled_tokens": "use --chunk-tokens",
    "enable_chunked_prefill": "use --paths to leave out the path chunked",
    "enable_prefix_caching": "use --paths to leave out the path prefix",
    "logits_processors": "eval scores decode steps by one of its own",
    "worker_extension_cls": "eval scores prefill by one of its own",
    "logprobs_mode": "eval compares log-probabilities as the model gives them",
    "skip_tokenizer_init": "eval reads texts with the tokenizer",
}
"""Arguments that eval sets, or without which its scores would not be what they are called, and what to do instead."""


def engine_arguments() -> set[str]:
    """The names of the arguments of `LLM`; none if they are not stated.

    Raises:
        ImportError: vLLM is not installed.
    """
    found = [node for node in _statements("engine", "arg_utils.py") if getattr(node, "name", "") == "EngineArgs"]
    lines = found[0].body if found else []
    return {line.target.id for line in lines if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)}


def cache_dtypes() -> set[str]:
    """vLLM's own values of `kv_cache_dtype`; none if they are not stated.

    Raises:
        ImportError: vLLM is not installed.
    """
    for node in _statements("config", "cache.py"):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CacheDType":
            return {item.value for item in ast.walk(node.value) if isinstance(item, ast.Constant)}
    return set()


def _statements(*path: str) -> list[ast.stmt]:
    """Those of one of vLLM's files."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("vLLM is not installed: install the extra vllm-int8kv[cuda] or vllm-int8kv[cpu]")
    return ast.parse(Path(spec.submodule_search_locations[0], *path).read_text()).body


def check_cache_dtype(name: str, option: str) -> None:
    """Check a value of `kv_cache_dtype` that an option names, as far as no other plugin may add some.

    Raises:
        ValueError: vLLM has none of this name.
        ImportError: vLLM is not installed.
    """
    plugins = [point.value for point in metadata.entry_points(group="vllm.general_plugins")]
    if any(not plugin.startswith(("vllm.", "vllm_int8kv:")) for plugin in plugins):
        return
    known = cache_dtypes()
    if known and name not in {*known, KV_CACHE_DTYPE}:
        raise ValueError(f"{option}: expected some of {', '.join(sorted({*known, KV_CACHE_DTYPE}))}, got {name!r}")


def check_engine_options(names: Collection[str], option: str, reserved: Mapping[str, str] = OWN) -> None:
    """Check the arguments of `LLM` that an option names.

    Args:
        reserved: those that it may not name, and what to do instead.

    Raises:
        ValueError: `LLM` has no such argument, or it is a reserved one.
        ImportError: vLLM is not installed.
    """
    if found := [name for name in names if name in reserved]:
        raise ValueError(f"{option}: {found[0]} cannot be set here; {reserved[found[0]]}")
    known = engine_arguments() if names else ()
    if known and (unknown := [name for name in names if name not in known]):
        similar = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        raise ValueError(f"{option}: vLLM's LLM has no argument {unknown[0]!r}{hint}")

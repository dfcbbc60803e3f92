"""The command `vllm-int8kv`: demo, eval, bench, doctor and serve."""

import json
import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_int8kv.config import KV_CACHE_DTYPE

app = typer.Typer(
    help="An INT8 KV cache for vLLM.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
LOG_WIDTH = 160
"""Columns of a file or pipe, where rich would squeeze tables into 80 and cut numbers off."""
console = Console()
error_console = Console(stderr=True)
if not (console.is_terminal or "COLUMNS" in os.environ):
    console.width = LOG_WIDTH


def fail(message: str) -> typer.Exit:
    """Print an error and return what to raise."""
    error_console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)
    return typer.Exit(1)


def check_files(files: dict[str, Path | None]) -> None:
    """Fail before anything is measured if a file, by the option that names it, could not be written afterwards."""
    for option, path in files.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise fail(f"{option}: the folder {path.absolute().parent} does not exist")
        if path is not None and path.is_dir():
            raise fail(f"{option}: expected a file, {path} is a folder")


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Path or name as vLLM takes it, or smollm2.")] = "smollm2",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of vLLM instead of progress bars.")] = False,
) -> None:
    """Compare an unquantized KV cache with the INT8 one: answers, memory, accuracy, speed."""
    from vllm_int8kv.commands.models import resolve
    from vllm_int8kv.evaluation.demo import DemoPlan, run_demo
    from vllm_int8kv.evaluation.engines.process import EngineError
    from vllm_int8kv.evaluation.progress import say

    check_files({"--json": json_file})
    try:
        path = resolve(model, partial(say, error_console))
        report = run_demo(DemoPlan(path), error_console, name=model, verbose=verbose)
    except (EngineError, ImportError, ValueError) as error:
        raise fail(str(error)) from None
    print_demo(report)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            json_file.unlink(missing_ok=True)
            raise fail(f"--json: {json_file} could not be written: {error}") from None


def print_demo(report: dict[str, Any]) -> None:
    """Show a report of `demo.run_demo`."""
    from vllm_int8kv.evaluation.machine import has_fast_bf16

    answers = Table("Prompt", "auto", KV_CACHE_DTYPE, title="Answers", show_lines=True)
    for row in report["prompts"]:
        answers.add_row(*(Text(text) for text in row.values()))
    console.print(answers)
    tokens, speed = report["kv_cache_tokens"], report["decode_tok_per_s"]
    table = Table("", *(f"{dtype}" for dtype in tokens), "ratio", title=report["model"])
    for column in table.columns[1:]:
        column.justify = "right"
    mebibytes = report["kv_cache_memory_bytes"] / 2**20
    table.add_row(
        f"tokens in {mebibytes:,.0f} MiB of cache",
        *(f"{count:,}" for count in tokens.values()),
        f"{report['capacity_ratio']:.2f}x",
    )
    table.add_row(
        f"decode tokens/s, {report['num_seqs']} x {report['context_len']:,} tokens of context",
        *(f"{rate:,.1f}" for rate in speed.values()),
        f"{speed[KV_CACHE_DTYPE] / speed['auto']:.2f}x",
    )
    table.add_row("KL divergence per token (nats)", "0", f"{report['kl_per_token']:.1e}", "")
    table.add_row("same most likely token", "100 %", f"{report['top1_agreement']:.1%}", "")
    console.print(table)
    if report["dtype"] == "float32" and not has_fast_bf16():
        console.print(
            "Weights, arithmetic and the cache `auto` in fp32: this CPU computes bf16 in software.", style="dim"
        )
    console.print(
        f"KL and top-1: {report['text_tokens']:,} tokens decoded one by one in fp32, over the whole vocabulary. "
        f"Speed: median step, {report['num_threads']} threads. Long answers may part where two words are about equally "
        "likely, as they do between any two engines that round differently.",
        style="dim",
    )


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Path or name as vLLM takes it, or smollm2.")] = "smollm2",
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to score; may be given again. Default: the model writes its own.")
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="KV cache dtypes to compare with auto; int8_custom:rotate_keys=false sets an option of this plugin, "
            f"fp8:block_size=64 one of vLLM. Default: auto,{KV_CACHE_DTYPE}, and fp8 where vLLM has it."
        ),
    ] = None,
    paths: Annotated[
        str, typer.Option(help="How scored tokens read the cache: decode, prefill, chunked, prefix.")
    ] = "decode,prefill,chunked,prefix",
    tokens: Annotated[int, typer.Option(min=2, help="Longer texts are cut to this.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Texts that the model writes when none is given.")] = 3,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Chunk of the path chunked.")] = 256,
    prefix_stride: Annotated[int, typer.Option(min=1, help="The path prefix scores every n-th token.")] = 16,
    generate_tokens: Annotated[int, typer.Option(min=0, help="Length of the greedy answers compared; 0: none.")] = 128,
    needle_lengths: Annotated[str, typer.Option(help="Contexts in which to hide a number; empty: none.")] = (
        "512,1024,2048"
    ),
    dtype: Annotated[
        str, typer.Option(help="Of weights and arithmetic; auto: float32 on CPU, the model's own elsewhere.")
    ] = "auto",
    engine_options: Annotated[str, typer.Option(help="More arguments of vLLM's LLM, as JSON.")] = "{}",
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank the layers by what they lose to INT8 instead.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="With --sensitivity: draw the layers into this PNG file.")] = None,
    policy: Annotated[
        Path | None, typer.Option(help="With --sensitivity: write the suggested layer policy to this YAML file.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of vLLM instead of progress bars.")] = False,
) -> None:
    """Measure what each KV cache dtype costs in accuracy: KL divergence, perplexity, greedy answers, needles."""
    from vllm_int8kv.commands.models import resolve
    from vllm_int8kv.evaluation.cache_spec import CacheSpec
    from vllm_int8kv.evaluation.engines.process import EngineError
    from vllm_int8kv.evaluation.eval_plan import make_plan
    from vllm_int8kv.evaluation.eval_report import print_report
    from vllm_int8kv.evaluation.evaluate import evaluate
    from vllm_int8kv.evaluation.progress import say
    from vllm_int8kv.evaluation.sensitivity import draw_layers, measure_layers, print_layers, write_policy

    check_files({"--json": json_file, "--plot": plot, "--policy": policy})
    if not sensitivity and (plot or policy):
        raise fail(f"{'--policy' if plot is None else '--plot'} needs --sensitivity")
    if plot is not None and find_spec("matplotlib") is None:
        raise fail("--plot needs matplotlib, which is not installed: install the extra vllm-int8kv[bench]")
    try:
        plan = make_plan(
            text or [],
            paths=paths,
            needle_lengths=needle_lengths,
            engine_options=engine_options,
            model=model,
            dtype=dtype,
            num_samples=samples,
            max_tokens=tokens,
            chunk_tokens=chunk_tokens,
            prefix_stride=prefix_stride,
            generate_tokens=generate_tokens,
        )
        optional = []
        if dtypes is None:
            dtypes, optional = f"auto,{KV_CACHE_DTYPE},fp8", ["fp8"]
        caches = [CacheSpec.parse(name, "--dtypes") for name in dtypes.split(",")]
        plan = replace(plan, model=resolve(model, partial(say, error_console)))
        if sensitivity:
            report = measure_layers(plan, error_console, name=model, verbose=verbose)
            if plot is not None:
                draw_layers(report, plot)
        else:
            report = evaluate(plan, caches, error_console, name=model, optional=optional, verbose=verbose)
    except (EngineError, ImportError, ValueError) as error:
        raise fail(str(error)) from None
    (print_layers if sensitivity else print_report)(report, console)
    if policy is not None:
        write_policy(report, policy)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")


@app.command()
def bench(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of one in configs/bench, as cpu_smoke.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the records. Default: benchmarks/results in a checkout, else int8kv_results."),
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster; default: start one on this machine.")
    ] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, do not continue an unfinished sweep.")] = False,
) -> None:
    """Measure tokens per second with every KV cache of a configuration, on one machine or a Ray cluster."""
    from vllm_int8kv.commands import configs

    try:
        from vllm_int8kv.commands.bench.run import run_bench
        from vllm_int8kv.evaluation.record import RESULTS

        path = configs.find("bench", config)
    except ImportError as error:
        raise fail(f"{error}; install the extra vllm-int8kv[bench,ray]") from None
    except ValueError as error:
        raise fail(str(error)) from None
    # Ray's processes fork after tokenizers have started their threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise typer.Exit(run_bench(path, RESULTS if out is None else out, address, fresh))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check versions, the plugin and the kernels. Exit code 1 and a remedy if something is wrong."""
    from vllm_int8kv.commands.doctor import diagnose

    checks = []
    for check in diagnose():
        checks.append(check)
        if not as_json:
            mark = ("ok   ", "green") if check.ok else ("FAIL ", "bold red")
            console.print(Text.assemble(mark, (f"{check.name}: ", "bold"), check.found), soft_wrap=True)
            if check.remedy:
                console.print(Text(f"     {check.remedy}"), soft_wrap=True)
    ok = all(check.ok for check in checks)
    if as_json:
        lines = [{"name": check.name, "ok": check.ok, "found": check.found, "remedy": check.remedy} for check in checks]
        typer.echo(json.dumps({"ok": ok, "checks": lines}, indent=2))
    raise typer.Exit(0 if ok else 1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="MODEL [any option of vllm serve]",
    epilog="The options of vLLM: vllm-int8kv serve --help=all, or --help=max-model-len for one.",
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Serve MODEL over the OpenAI API, with --kv-cache-dtype int8_custom unless another is given.

    MODEL is a path or name as vLLM takes it, or smollm2.
    """
    if not context.args or context.args[0] in ("-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if context.args else 2)
    from vllm_int8kv.commands.serve import serve as run_server

    try:
        run_server(context.args)
    except (ImportError, ValueError) as error:
        raise fail(str(error)) from None


if __name__ == "__main__":
    app()

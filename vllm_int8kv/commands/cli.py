"""The command `vllm-int8kv`: demo, eval, tune, bench, doctor, serve and store."""

import json
import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from vllm_int8kv.commands import store
from vllm_int8kv.commands.terminal import check_files, console, error_console, fail
from vllm_int8kv.commands.tune import tune
from vllm_int8kv.config import KV_CACHE_DTYPE

app = typer.Typer(
    help="An INT8 KV cache for vLLM.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Path or name as vLLM takes it, or smollm2.")] = "smollm2",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of vLLM instead of progress bars.")] = False,
) -> None:
    """Compare an unquantized KV cache with INT8 and with k6v4: answers, memory, accuracy, speed."""
    from vllm_int8kv.commands.models import resolve
    from vllm_int8kv.evaluation.demo import DemoPlan, print_demo, run_demo
    from vllm_int8kv.evaluation.engines.process import EngineError
    from vllm_int8kv.evaluation.progress import say

    check_files({"--json": json_file})
    try:
        path = resolve(model, partial(say, error_console))
        report = run_demo(DemoPlan(path), error_console, name=model, verbose=verbose)
    except (EngineError, ImportError, ValueError) as error:
        raise fail(str(error)) from None
    print_demo(report, console)
    if json_file is not None:
        try:
            json_file.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            json_file.unlink(missing_ok=True)
            raise fail(f"--json: {json_file} could not be written: {error}") from None


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


app.command()(tune)
app.add_typer(store.app, name="store")


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

    MODEL is a path or name as vLLM takes it, or smollm2. The dtype takes options of this plugin, as
    int8_custom:format=k6v4.
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

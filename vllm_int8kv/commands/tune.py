"""The command `vllm-int8kv tune`."""

import json
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from vllm_int8kv.commands import configs
from vllm_int8kv.commands.terminal import check_files, console, error_console, fail

PACKAGES = {"optuna": "optuna", "scipy": "scipy", "sklearn": "scikit-learn"}
"""What the search needs, by the name under which it is imported."""
JOURNAL_SUFFIX = ".journal.jsonl"


def tune(
    model: Annotated[str, typer.Argument(help="Path or name as vLLM takes it, or smollm2.")] = "smollm2",
    policy: Annotated[
        Path | None, typer.Option(help="Write the policy to this YAML file, which the option layer_policy reads.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text; may be given again. The first half of each is for the search, the other half for the truth. "
            "Default: the model writes its own."
        ),
    ] = None,
    max_bits: Annotated[float | None, typer.Option(help="Mean bits per element, scales not counted.")] = None,
    max_kl: Annotated[float | None, typer.Option(help="KL divergence per token, in nats.")] = None,
    min_tokens_ratio: Annotated[
        float | None, typer.Option(help="Tokens in the same memory against the unquantized cache, scales counted.")
    ] = None,
    pairs: Annotated[str, typer.Option(help="Cache formats to choose from, as k8v8,k6v4; default: all of them.")] = "",
    search: Annotated[
        str,
        typer.Option(
            help="additive: exact, by the sums of what layers lose; nsga2: an evolution of measured policies."
        ),
    ] = "additive",
    trials: Annotated[int, typer.Option(min=1, help="Policies that nsga2 measures.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure this layer policy, of tune or of KVTuner, instead of a search: a file, or the name of one in "
            "configs/policies, as smollm2; may be given again."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=4, help="Longer texts are cut to this.")] = 1024,
    samples: Annotated[int, typer.Option(min=1, help="Texts that the model writes when none is given.")] = 2,
    dtype: Annotated[
        str, typer.Option(help="Of weights and arithmetic; auto: float32 on CPU, the model's own elsewhere.")
    ] = "auto",
    engine_options: Annotated[str, typer.Option(help="More arguments of vLLM's LLM, as JSON.")] = "{}",
    journal: Annotated[
        Path | None,
        typer.Option(
            help="Keep every measurement in this file, and continue from it. Default: beside --policy, as "
            f"FILE{JOURNAL_SUFFIX}."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew, do not continue the journal.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against memory into this PNG file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    verbose: Annotated[bool, typer.Option(help="Show the log of vLLM instead of a progress bar.")] = False,
) -> None:
    """Find out how many bits each layer needs, and write a policy that keeps to a limit of memory or of accuracy."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if plot is not None and find_spec("matplotlib") is None:
        missing.append("matplotlib")
    if missing:
        raise fail(f"tune needs {', '.join(missing)}: install the extra vllm-int8kv[tune]")
    from vllm_int8kv.commands.models import resolve
    from vllm_int8kv.evaluation.engines.process import EngineError
    from vllm_int8kv.evaluation.eval_plan import make_plan
    from vllm_int8kv.evaluation.progress import say
    from vllm_int8kv.evaluation.tuning import report as reports
    from vllm_int8kv.evaluation.tuning.plan import TunePlan, check_options, make_limit, read_pairs
    from vllm_int8kv.evaluation.tuning.tune import tune as run_tune

    if journal is None and policy is not None:
        journal = policy.with_name(policy.name + JOURNAL_SUFFIX)
    check_files({"--json": json_file, "--plot": plot, "--policy": policy, "--journal": journal})
    try:
        eval_plan = make_plan(
            text or [],
            paths="prefill",
            needle_lengths="",
            engine_options=engine_options,
            model=model,
            dtype=dtype,
            num_samples=samples,
            max_tokens=tokens,
            generate_tokens=0,
        )
        plan = TunePlan(
            eval_plan,
            pairs=read_pairs(pairs),
            limit=make_limit(max_bits, max_kl, min_tokens_ratio),
            search=search,
            num_trials=trials,
            seed=seed,
            policies=tuple(configs.find("policies", name) for name in evaluate or ()),
            journal=journal,
        )
        check_options(plan, partial(say, error_console))
        if policy is not None and plan.policies:
            raise ValueError("--policy: --evaluate searches for no policy, so there is none to write")
        plan = replace(plan, eval_plan=replace(eval_plan, model=resolve(model, partial(say, error_console))))
        if fresh and journal is not None:
            journal.unlink(missing_ok=True)
        report = run_tune(plan, error_console, name=model, verbose=verbose)
    except (EngineError, ImportError, ValueError) as error:
        raise fail(str(error)) from None
    except KeyboardInterrupt:
        kept = "nothing is kept" if journal is None else f"what was measured is in {journal}; run it again to go on"
        raise fail(f"interrupted: {kept}") from None
    reports.print_tuning(report, console)
    if policy is not None:
        reports.write_policy(report, policy)
    if plot is not None:
        reports.draw_tuning(report, plot)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")

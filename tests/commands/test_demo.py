"""`vllm-int8kv demo`: all of it on a tiny scale, its tables, and its messages for bad input."""

import importlib
import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_int8kv.commands import cli, models
from vllm_int8kv.evaluation import demo, machine
from vllm_int8kv.evaluation.cache_spec import CacheSpec

runner = CliRunner()
K6V4 = "int8_custom:format=k6v4"
SMALL = "Because of small particles."
REPORT = {
    "model": "smollm2",
    "prompts": [
        {
            "prompt": "Why is the sky blue?",
            "answers": {
                "auto": SMALL,
                "int8_custom": SMALL,
                K6V4: "Because of " + "very " * 7 + "small particles, which scatter.",
            },
        }
    ],
    "kv_cache_tokens": {"auto": 93056, "int8_custom": 180480, K6V4: 270848},
    "capacity_ratio": {"auto": 1.0, "int8_custom": 180480 / 93056, K6V4: 270848 / 93056},
    "decode_tok_per_s": {"auto": 75.0, "int8_custom": 231.4, K6V4: 60.0},
    "decode_ratio": {"auto": 1.0, "int8_custom": 231.4 / 75, K6V4: 0.8},
    "kl_per_token": {"auto": 0.0, "int8_custom": 1.9e-4, K6V4: 7e-3},
    "top1_agreement": {"auto": 1.0, "int8_custom": 0.994, K6V4: 0.96},
    "text_tokens": 1673,
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 2**31,
    "num_seqs": 8,
    "context_len": 4096,
    "num_threads": 2,
}


def test_demo_refuses_a_json_file_in_no_folder(tmp_path):
    result = runner.invoke(cli.app, ["demo", "--json", str(tmp_path / "missing" / "report.json")])
    assert result.exit_code == 1
    assert result.stderr == f"Error: --json: the folder {tmp_path / 'missing'} does not exist\n"


def test_demo_shows_the_error_of_an_engine(tmp_path):
    result = runner.invoke(cli.app, ["demo", str(tmp_path / "no-model")])
    assert result.exit_code == 1
    dtype = "auto" if machine.has_fast_bf16() else "float32"
    assert f"Error: the engine with kv_cache_dtype='auto' and dtype='{dtype}' ended with exit code 1" in result.stderr
    assert result.stderr.startswith("auto: load ...\nError: ")
    assert "no-model" in result.stderr.split("Its last lines:")[1]


@pytest.mark.engine
def test_demo_on_a_tiny_scale(monkeypatch):
    """All engines and the report, with a short text and context."""
    # Threads of a pool wait for one another; on a busy machine that takes longer than the work.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan = demo.DemoPlan(
        str(models.smollm2()),
        prompts=demo.PROMPTS[:1],
        answer_tokens=12,
        text=demo.TEXT.read_text()[:600],
        num_seqs=2,
        context_len=256,
        decode_steps=4,
    )
    log = StringIO()
    report = demo.run_demo(plan, Console(file=log), name="smollm2")

    begun = re.findall(r"^(.+) \.\.\.$", log.getvalue(), flags=re.MULTILINE)
    assert begun[0] == "auto: load" and {"auto: decode", "int8_custom: decode", f"{K6V4}: decode"} < set(begun)
    assert re.findall(r"^(.+), \d+ s$", log.getvalue(), flags=re.MULTILINE) == begun
    assert report["model"] == "smollm2"
    (row,) = report["prompts"]
    assert row["prompt"] == demo.PROMPTS[0]
    assert list(row["answers"]) == ["auto", "int8_custom", K6V4]
    assert all("Paris" in answer for answer in row["answers"].values())
    tokens, speed, capacity = report["kv_cache_tokens"], report["decode_tok_per_s"], report["capacity_ratio"]
    assert capacity == {cache: count / tokens["auto"] for cache, count in tokens.items()}
    assert capacity["auto"] == 1 and capacity["int8_custom"] > 1.8, "few blocks, hence not 1.94"
    assert capacity[K6V4] > 2.7, "nor 2.91"
    assert all(rate > 0 for rate in speed.values())
    assert report["decode_ratio"] == {cache: rate / speed["auto"] for cache, rate in speed.items()}
    divergences = report["kl_per_token"]
    assert divergences["auto"] == 0 < divergences["int8_custom"] < 2e-3
    assert 2 * divergences["int8_custom"] < divergences[K6V4] < 2e-2, "fp8 costs 2.9e-2"
    assert report["top1_agreement"]["auto"] == 1
    assert all(0.85 < report["top1_agreement"][cache] <= 1 for cache in ("int8_custom", K6V4))
    assert report["dtype"] == ("bfloat16" if machine.has_fast_bf16() else "float32")
    assert report["context_len"] == 256
    assert json.loads(json.dumps(report)) == report

    shown = StringIO()
    demo.print_demo(report, Console(file=shown, width=100))
    assert "capital of France" in shown.getvalue() and f"({capacity[K6V4]:.2f}x)" in shown.getvalue()


def test_tables_of_the_demo_fit_a_terminal_of_100_columns():
    """Whole numbers, each beside its ratio, and answers in full unless they are those of the unquantized cache."""
    shown = StringIO()
    demo.print_demo(REPORT, Console(file=shown, width=100))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 100 and "…" not in shown.getvalue()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := [cell.strip() for cell in line.split("│")[1:-1]]) > 2}
    assert rows == {
        "tokens in 2,048 MiB of cache": ["93,056", "180,480 (1.94x)", "270,848 (2.91x)"],
        "decode tokens/s at 8 x 4,096 tokens": ["75.0", "231.4 (3.09x)", "60.0 (0.80x)"],
        "KL divergence per token (nats)": ["0", "1.9e-04", "7.0e-03"],
        "same most likely token": ["100 %", "99.4%", "96.0%"],
    }
    answers = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    assert ["", "Why is the sky blue?"] in answers
    assert ["int8_custom", "the same"] in answers
    assert [K6V4, "Because of " + "very " * 7 + "small particles, which"] in answers
    assert ["", "scatter."] in answers, "wrapped, not cut off"


@pytest.mark.parametrize(
    ("dtype", "has_fast_bf16", "engines"),
    [
        ("auto", True, [("auto", "answer decode"), ("float32", "text")]),
        ("bfloat16", False, [("bfloat16", "answer decode"), ("float32", "text")]),
        ("auto", False, [("float32", "answer text decode")]),
        ("float32", True, [("float32", "answer text decode")]),
    ],
)
def test_engines_of_the_demo(dtype, has_fast_bf16, engines, monkeypatch):
    """The text is scored in fp32; engines that would have the same dtype are one."""
    monkeypatch.setattr(demo, "has_fast_bf16", lambda: has_fast_bf16)
    plans = demo.make_plans(demo.DemoPlan("model", dtype=dtype), "/folder")
    assert [(plan.dtype, plan.kv_cache_dtype, " ".join(plan.stages())) for plan in plans] == [
        (dtype, cache.name, f"load {stages}") for dtype, stages in engines for cache in demo.DTYPES
    ]
    assert [plan.is_reference for plan in plans if plan.text] == [True, False, False]
    assert len({plan.scores_path for plan in plans if plan.text}) == 3


def test_caches_of_the_demo_are_what_their_names_say():
    """An engine of the demo is told the name alone."""
    assert [CacheSpec.parse(cache.name, "DTYPES") for cache in demo.DTYPES] == list(demo.DTYPES)
    assert [cache.name for cache in demo.DTYPES] == ["auto", "int8_custom", K6V4]


@pytest.mark.parametrize(
    ("seconds_per_prompt", "longest", "context_len"),
    [(0.5, 4096, 4096), (5.0, 4096, 1280), (100.0, 4096, 256), (100.0, 1000, 1000)],
)
def test_contexts_of_the_demo_are_as_long_as_there_is_time_for(monkeypatch, seconds_per_prompt, longest, context_len):
    """50 seconds for eight sequences; one prompt of 1,024 tokens is timed, if contexts are longer than that."""
    demo_engine = importlib.import_module("vllm_int8kv.evaluation.engines.demo_engine")
    now, prompts = [0.0], []

    class Engine:
        def generate(self, prompt, params, use_tqdm):
            prompts.append(len(prompt["prompt_token_ids"]))
            now[0] += seconds_per_prompt

    monkeypatch.setattr(demo_engine.time, "perf_counter", lambda: now[0])
    found = demo_engine.choose_context(Engine(), demo.DemoPlan("model"), longest, vocab_size=1000)
    assert found == context_len
    assert prompts == ([1024] if longest > 1024 else [])


def test_text_of_the_demo_is_long_enough():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(models.smollm2()) / "tokenizer.json"))
    assert len(tokenizer.encode(demo.TEXT.read_text()).ids) >= 1500

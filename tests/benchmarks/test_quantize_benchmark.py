"""The ladder's benchmark checks before it times, and its records say what was measured."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import capture
from benchmarks.ladder import operands, quantize, quantize_errors
from benchmarks.report.ladder import plots as ladder_plots
from benchmarks.report.ladder import tables as ladder_tables
from vllm_int8kv.cache.ladder import CUDA_VARIANTS
from vllm_int8kv.evaluation import record

ROOT = Path(__file__).resolve().parents[2]


def run(monkeypatch, out, **options):
    """The command with these options; returns its exit status."""
    monkeypatch.setattr(quantize.timing, "cold_copies", lambda nbytes: 2)
    defaults = {
        "device": quantize.record.Device.cpu,
        "every": False,
        "shape": ["40x70"],
        "errors": quantize.Errors.uniform,
    }
    defaults |= {"dtype": quantize.DType.float32, "seconds": 0.0, "seed": 0, "busy": True, "out": out}
    with pytest.raises(SystemExit) as exit_:
        quantize.main(**defaults | options)
    return exit_.value.code


def test_it_measures_and_records(monkeypatch, tmp_path, set_num_threads):
    set_num_threads(1)
    assert run(monkeypatch, tmp_path) == 0
    lines = record.read("quantize", tmp_path)
    measured = {(line.impl, line.case["operation"]) for line in lines}
    variants = {"column_strided", "row_major", "tiled", "simd", "vectorized"}
    operations = {"quantize", "quantize_with_scales", "dequantize"}
    assert measured >= {(variant, name) for variant in variants - {"vectorized"} for name in operations}
    for line in lines:
        moved = 40 * 70 * (8 if line.impl == "copy" else 5) + (0 if line.impl == "copy" else 4 * 70)
        assert line.bytes_moved == moved
        assert line.gb_per_s == pytest.approx(moved / line.median_us / 1e3, abs=1e-3)
    loops = {
        line.case["operation"]: line.median_us for line in lines if (line.impl, line.num_threads) == ("row_major", 1)
    }
    simd = next(line for line in lines if line.impl == "simd" and line.case["operation"] == "quantize")
    assert simd.metrics["vs_row_major"] == pytest.approx(loops["quantize"] / simd.median_us, rel=1e-3, abs=1e-3)

    (errors,) = record.read("quantize_error", tmp_path)
    assert errors.metrics["max_abs_error"] <= errors.metrics["half_step"] * (1 + 2**-16)
    assert errors.metrics["l2_error"] == pytest.approx(errors.metrics["theory_l2_error"], rel=0.1)


def test_tables_beside_the_paper(monkeypatch, tmp_path, set_num_threads):
    """From a run of a small shape, renamed to one of the paper's, and from a made-up one on a GPU."""
    set_num_threads(1)
    tables, plots = ladder_tables, ladder_plots
    monkeypatch.setitem(tables.PAPER, (40, 70), (2.0, 4.0, 1.5, 0.25))
    run(monkeypatch, tmp_path / "cpu")
    lines = record.read("quantize", tmp_path / "cpu")
    table = tables.ladder_table(tmp_path / "cpu")
    assert "| 40 x 70 | 2,000 | 4 | 500.0x |" in table and "No GPU time yet" in table
    assert "| `simd`, quantize with scales | 1 |" in table

    on_gpu = replace(lines[0], device="a GPU", resolved_backend="int8kv cuda", num_threads=1)
    for variant in CUDA_VARIANTS:
        for operation in ("quantize_with_scales",) if variant == "fused" else tables.OPERATIONS:
            case = on_gpu.case | {"device": "cuda", "operation": operation}
            metrics = {"copy_gb_per_s": 1.0, "frac_of_copy": 0.875}
            timed = {"p10_us": 1.0, "median_us": 250.0, "p90_us": 1e6}
            record.append(replace(on_gpu, impl=variant, case=case, metrics=metrics, **timed), tmp_path / "cpu")
    table = tables.ladder_table(tmp_path / "cpu")
    assert "| 40 x 70 | 4 | 0.5 | 0.5 | 0.5 | 0.5 | 0.25 | 88% | 88% |" in table
    assert "| 40 x 70 | 2,000 | 4 | 500.0x |" in table  # the CPU's stays

    for name, (data, draw) in plots.PLOTS.items():
        draw(data(tmp_path / "cpu"), tmp_path / f"{name}.png")
        assert 1000 < (tmp_path / f"{name}.png").stat().st_size < 150_000


def test_a_wrong_variant_is_not_timed(monkeypatch, tmp_path):
    right = operands.ladder.quantize_per_channel

    def wrong(x, *, variant="vectorized", **options):
        codes, scales = right(x, variant=variant, **options)
        if variant == "tiled":
            codes[-1, -1] += 1
        return codes, scales

    monkeypatch.setattr(operands.ladder, "quantize_per_channel", wrong)
    quantize.torch.set_num_threads(1)
    assert run(monkeypatch, tmp_path) == 1
    assert record.read("quantize", tmp_path) == []


def test_a_shape_that_does_not_fit_is_named(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, shape=["1000000000x1000"]) == 1
    out = capsys.readouterr().out.replace("\n", " ")
    assert "1000000000x1000 needs 19000.7 GB of memory" in out  # to time it
    assert "1000000000x1000 needs 9000.7 GB of memory" in out  # for the errors


@pytest.mark.parametrize("text", ["131072", "x5", "0x64", "-1x5", "axb"])
def test_a_bad_shape_is_named(text):
    with pytest.raises(quantize.typer.BadParameter, match=f"TOKENSxCHANNELS, .* got '{text}'"):
        quantize.parse_shape(text)


def test_the_ten_shapes_of_the_paper():
    shapes = {(shape.num_tokens, shape.num_channels) for shape in operands.SHAPES}
    assert shapes == set(ladder_tables.PAPER)


def test_errors_of_a_layer():
    errors = quantize_errors
    query, kv = torch.randn(64, 4, 32), torch.randn(2, 64, 2, 32)
    kv[0, :, :, 5] *= 30  # an outlier channel, as keys have them
    kv[0, 50, 0, 7] = 100.0  # beyond what the first half of the tokens knows
    found = errors.layer_errors(errors.Captured(query, kv[0], kv[1], 1 / math.sqrt(32)))
    assert list(found) == ["per_channel", "per_channel_static", "int8_custom"]
    assert found["per_channel"]["max_abs_error_key"] <= kv[0].abs().max() / 254 * (1 + 2**-16)
    assert found["per_channel_static"]["max_abs_error_key"] > 90
    assert found["per_channel_static"]["e_o"] > 2 * found["per_channel"]["e_o"]
    assert found["int8_custom"]["e_k"] < 0.01


@pytest.mark.engine
def test_capture_sees_what_transformers_computes(tmp_path):
    """Keys after RoPE and values of every layer, against the cache of another implementation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_int8kv.commands import models
    from vllm_int8kv.evaluation import demo

    captured = list(capture.capture(num_tokens=48, dtype="float32").values())
    folder = models.smollm2()
    token_ids = AutoTokenizer.from_pretrained(folder).encode(demo.TEXT.read_text())[:48]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        layers = model(torch.tensor([token_ids]), use_cache=True).past_key_values.layers
    assert len(captured) == len(layers) == 30
    for seen, layer in zip(captured, layers, strict=True):
        assert seen.query.shape == (48, 9, 64) and seen.softmax_scale == 0.125
        torch.testing.assert_close(seen.key, layer.keys[0].transpose(0, 1), rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(seen.value, layer.values[0].transpose(0, 1), rtol=1e-3, atol=1e-2)


def test_a_failed_capture_shows_the_log():
    with pytest.raises(RuntimeError, match="the capture of /no/such/model exited with 1"):
        capture.capture(model="/no/such/model", num_tokens=4)

"""Decoding from X in place: the formula against the paper's numbers, and the layer that is timed."""

import math

import pytest
import torch

from benchmarks.report import xquant_tables
from benchmarks.roofline import roofline
from benchmarks.roofline.cost import (
    MACHINES,
    MODELS,
    Cost,
    Machine,
    attention_slowdown,
    free_length,
    from_latents,
    from_x,
    k8v8,
    layer_seconds,
    slowdown,
)
from benchmarks.roofline.in_place import InPlaceLayer
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.evaluation import record

LLAMA_2_7B, LLAMA_3_8B, SMOLLM2 = MODELS
PAPERS_GPU = MACHINES[0]


def test_free_lengths_are_the_papers():
    """Section 3.4 of arXiv 2508.10395: 2.3K tokens for Llama-2-7B from 2-bit X, 40.6K for Llama-3.1-8B from latents."""
    assert PAPERS_GPU.ridge == 378
    assert free_length(PAPERS_GPU, LLAMA_2_7B, from_x(LLAMA_2_7B, 2)) == pytest.approx(2300, rel=0.01)
    assert free_length(PAPERS_GPU, LLAMA_3_8B, from_latents(LLAMA_3_8B, 2)) == pytest.approx(40600, rel=0.02)


def test_weights_and_caches_have_the_sizes_of_the_models():
    assert LLAMA_2_7B.weight_bytes / 4096**2 == pytest.approx(24, rel=0.01), "the paper counts 24 d^2"
    assert LLAMA_3_8B.weight_bytes == 2 * 218_103_808, "the parameters of a layer without its norms"
    assert SMOLLM2.k8v8_bytes == 3 * K8V8.content_bytes(64)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("batch", [1, 32])
def test_at_the_free_length_compute_and_memory_take_equally_long(machine, batch):
    cost = from_x(LLAMA_2_7B, 8)
    length = free_length(machine, LLAMA_2_7B, cost, batch)
    compute = batch * length * cost.flops / machine.flops_per_s
    memory = (LLAMA_2_7B.weight_bytes + batch * length * cost.bytes) / machine.bytes_per_s
    assert compute == pytest.approx(memory) == pytest.approx(layer_seconds(machine, LLAMA_2_7B, cost, length, batch))
    assert length == pytest.approx(free_length(machine, LLAMA_2_7B, cost) / batch)


def test_what_multiplies_nothing_is_always_free():
    assert free_length(PAPERS_GPU, SMOLLM2, k8v8(SMOLLM2)) == math.inf
    assert (
        slowdown(PAPERS_GPU, SMOLLM2, k8v8(SMOLLM2), 4096)
        == attention_slowdown(PAPERS_GPU, SMOLLM2, k8v8(SMOLLM2))
        == 1
    )


def test_half_the_bytes_take_half_the_time_where_compute_is_free():
    machine = Machine("no compute", math.inf, 1e9, "none")
    half = Cost("half", 1.0, k8v8(SMOLLM2).bytes / 2)
    assert attention_slowdown(machine, SMOLLM2, half) == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_from_x_is_right(dtype):
    layer = InPlaceLayer(SMOLLM2, 100, dtype, seed=0)
    assert 0 < layer.check() < (0.02 if dtype == torch.bfloat16 else 1e-5)
    assert torch.equal(layer.attend(0), layer.attend(1)), "copies are alike"
    layer.scales[50:] *= 2  # the reference takes them from where attention does
    assert layer.check() < 0.02
    layer.codes[0] = -layer.codes[0]
    layer.w_kv[:, : SMOLLM2.kv_width] *= -1
    with_other_values = layer.attend(0)
    assert not torch.allclose(with_other_values, layer.attend(1), atol=0.1)


def test_it_computes_measures_and_records(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roofline, "MATMUL_SIZES", (64,))
    monkeypatch.setattr(roofline, "MODELS", MODELS[-1:])
    monkeypatch.setattr(roofline, "SEQ_LENS", (32,))
    monkeypatch.setattr(roofline, "MIN_CORES", 0.0)
    with pytest.raises(SystemExit, match="0"):
        roofline.main(threads=1, quick=False, seed=0, out=tmp_path)
    products, layers = [], []
    for line in record.read("remat", tmp_path):
        (products if line.impl == roofline.MATMUL else layers).append(line)
    assert [line.metrics["flops_per_s"] > 0 for line in products] == [True, True]
    assert [line.impl for line in layers] == [roofline.FROM_X, roofline.FROM_KV]
    assert layers[0].case["seq_len"] == 32 and 0 < layers[0].rel_error < 0.02
    printed = capsys.readouterr().out
    assert all(machine.name in printed for machine in MACHINES) and "this CPU, 1 threads" in printed
    table = xquant_tables.roofline_table(tmp_path)
    assert all(f"**{machine.name}**" in table for machine in MACHINES)
    assert f"| {SMOLLM2.name} | 32 | {layers[0].median_us:,.0f} | {layers[1].median_us:,.0f} |" in table


def test_the_measured_length_lies_where_reading_the_weights_takes_as_long(tmp_path):
    class Line:
        def __init__(self, median_us):
            self.median_us = median_us

    reading_us = SMOLLM2.weight_bytes / 1e4  # at 10 GB/s
    slower = {64: 0.0, 256: 0.5 * reading_us, 1024: 1.5 * reading_us}
    lines = {
        (SMOLLM2.name, seq_len, impl): Line(100 + (more if impl == roofline.FROM_X else 0))
        for seq_len, more in slower.items()
        for impl in (roofline.FROM_X, roofline.FROM_KV)
    }
    assert xquant_tables.free_when_measured(SMOLLM2, lines, 10.0) == "640"
    assert xquant_tables.free_when_measured(SMOLLM2, lines, 1.0) == "more than 1,024"
    assert xquant_tables.roofline_table(tmp_path) == xquant_tables.NOT_MEASURED

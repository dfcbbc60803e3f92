"""The cases of `kernels.py`, and what of its GPU side a CPU can run."""

import contextlib
import gc
import weakref

import pytest
import torch

from benchmarks import timing
from benchmarks.operators import cases, cuda_peers, kernels, layers, peers
from vllm_int8kv.evaluation import record

SHAPES = {
    "decode": dict(num_seqs=3, seq_len=100, query_len=1, num_heads=8, num_kv_heads=2, head_size=64, block_size=16),
    "verify": dict(num_seqs=2, seq_len=70, query_len=4, num_heads=6, num_kv_heads=2, head_size=64, block_size=16),
    "prefill": dict(num_seqs=1, seq_len=50, query_len=50, num_heads=4, num_kv_heads=1, head_size=128, block_size=16),
}


def test_gpu_cases_reach_from_one_short_sequence_to_long_and_large_batches():
    found = list(cases.gpu_cases())
    decode = [case.shape for case in found if case.what == "decode"]
    assert {(shape.num_heads, shape.num_kv_heads) for shape in decode} == {(32, 8), (28, 4), (8, 1), (16, 8)}
    ragged = [shape for shape in decode if len(set(shape.seq_lens)) > 1]
    assert ragged and all(min(shape.seq_lens) == 256 for shape in ragged)
    assert {shape.seq_len for shape in decode if shape not in ragged} == {1024, 8192, 32768, 131072}
    assert {shape.num_seqs for shape in decode if shape.seq_len == 1024} == {1, 8, 64, 256}
    assert {case.what for case in found} == {"decode", "verify", "write", "prefill"}
    assert len(set(found)) == len(found)
    # In bf16, the largest format: what a small GPU holds beside its copies.
    assert max(s.num_blocks * s.block_size * s.num_kv_heads * s.head_size * 4 for s in decode) <= 9 << 30


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_peers_that_run_on_cpu_answer_as_their_format_stores(shape):
    found = [peers.Int8Custom(), cuda_peers.Sdpa(device="cpu")]
    measured = layers.Layers(peers.Shape(**shape), found, seed=0)
    errors = {peer.name: measured.check(peer) for peer in found}
    assert all(0 < error < 0.005 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["decode", "verify"])
def test_xformers_gets_what_its_mask_asks_for(monkeypatch, name):
    """Its kernel needs a GPU; here attention by its mask, written out, over keys and values as it is given them."""
    fmha = pytest.importorskip("xformers.ops.fmha", reason="needs xformers, of the bench extra")

    def forward(query, key, value, mask, *, scale, op):
        assert op is fmha.triton_splitk.FwOp
        bias = mask.materialize((query.shape[1], mask.k_seqinfo.padding * len(mask.block_tables)))
        pages = (x[:, : bias.shape[-1]] for x in (key, value))
        rows = (x[0].permute(1, 2, 0, 3).float() for x in (query, *pages))
        out = torch.nn.functional.scaled_dot_product_attention(*rows, attn_mask=bias, scale=scale)
        return out.permute(2, 0, 1, 3)[None].to(query.dtype)

    monkeypatch.setattr(fmha, "memory_efficient_attention_forward", forward)
    shape = peers.Shape(**SHAPES[name] | {"block_size": 64})
    peer = cuda_peers.XFormers(device="cpu")
    assert 0 < layers.Layers(shape, [peer], seed=0).check(peer) < 0.005


def test_a_ragged_batch_is_attended_to_its_lengths():
    shape = peers.RaggedShape(**SHAPES["decode"] | {"num_seqs": 5, "seq_len": 300}, shortest=20)
    assert sorted(shape.seq_lens) == [20, 39, 77, 152, 300]
    assert 0 < layers.Layers(shape, [peers.Int8Custom()], seed=0).check(peers.Int8Custom()) < 0.005
    case = cases.Case(cases.What.decode, shape)
    assert cases.bytes_moved(case, peers.Int8Custom()) == 588 * 2 * 132
    with pytest.raises(ValueError, match="sequences of one length"):
        cuda_peers.Sdpa(device="cpu").plan(shape, None)


def test_what_is_not_installed_is_named_with_the_reason():
    assert "FlashInfer" in cuda_peers.missing()


def test_bytes_of_a_case_are_those_of_its_format():
    shape = peers.Shape(**SHAPES["decode"])
    case = cases.Case(cases.What.decode, shape)
    assert cases.bytes_moved(case, peers.Int8Custom()) == 3 * 100 * 2 * 132
    assert cases.bytes_moved(case, cuda_peers.TritonInt8PerTokenHead()) == 3 * 100 * 2 * 136
    assert cases.bytes_moved(case, cuda_peers.FlashInfer(cuda_peers.FP8)) == 3 * 100 * 2 * 128
    assert cases.bytes_moved(case, cuda_peers.Sdpa()) == 3 * 100 * 2 * 256


def test_the_cases_of_one_model_are_a_third_of_all():
    found = cases.choose_cases(record.Device.cuda, quick=False, first_model=True)
    assert {(case.shape.num_heads, case.shape.num_kv_heads, case.shape.head_size) for case in found} == {(32, 8, 128)}
    assert {case.what for case in found} == {"decode", "verify", "write", "prefill"}
    assert {case.shape.block_size for case in found} == {16, 64}
    assert len(found) < len(list(cases.gpu_cases())) / 2


def test_peers_are_chosen_by_how_their_names_begin(monkeypatch):
    every = [peers.Int8Custom(), cuda_peers.Sdpa(), cuda_peers.Triton(), cuda_peers.FlashInfer(cuda_peers.FP8)]
    monkeypatch.setattr(cuda_peers, "load", lambda: every)
    shape = cases.Case(cases.What.decode, peers.Shape(**SHAPES["decode"]))
    assert kernels.load_peers(shape, record.Device.cuda) == every
    assert kernels.load_peers(shape, record.Device.cuda, ("triton", "flash_attn_3")) == [every[0], every[2]]
    assert kernels.load_peers(shape, record.Device.cuda, ("int8_custom",)) == every[:1]


def test_a_graph_keeps_alive_what_it_uses(monkeypatch):
    """A graph that outlives the tensors of its call reads freed memory: FlashAttention's metadata, once."""
    replays = []

    class Graph:
        def replay(self):
            replays.append(buffer())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    def make_call():
        tensor = torch.ones(3)
        return (lambda turn: tensor.add_(1)), weakref.ref(tensor)

    call, buffer = make_call()
    graph = timing.GpuGraph(call, 2)
    del call
    gc.collect()
    graph(0)
    assert replays[0] is not None and replays[0].tolist() == [3.0] * 3

"""Prompts through an attention library: every key is seen once, whatever the workspace holds."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hostile import assert_attention_close, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_attention import plain_attention

from vllm_int8kv.cache import ops, reference
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.serving import prefill, varlen_attention


def attend(batch, max_rows, attention=plain_attention, num_decodes=0, dtype=torch.float32, **options):
    """(out, lse) like `ops.paged_attention`, lse from there."""
    plan = prefill.make_plan(
        batch.query_start_loc.tolist(),
        batch.seq_lens.tolist(),
        num_decodes=num_decodes,
        sliding_window=options.get("sliding_window"),
        max_rows=max_rows,
        device=batch.query.device,
    )
    shape = (plan.num_rows, batch.kv_cache.shape[1], K8V8.head_size_of(batch.kv_cache))
    workspace = torch.full((2, *shape), torch.nan, dtype=batch.query.dtype, device=batch.query.device)
    # Padding tokens hold NaN and belong to no group.
    out = torch.full(batch.query.shape, torch.nan, dtype=batch.query.dtype, device=batch.query.device)
    options["cache_format"] = K8V8
    prefill.attend(batch.query, batch.kv_cache, batch.block_table, plan, (*workspace,), attention, out=out, **options)
    _, lse = ops.paged_attention(*batch.args, **options, return_lse=True)
    return out, lse


LENS = [(20, 20), (33, 150), (17, 400), (60, 61)]
OPTIONS = {
    "plain": {},
    "sliding-window": {"sliding_window": 50},
    "non-causal": {"causal": False},
    "non-causal-window": {"causal": False, "sliding_window": 70},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": torch.linspace(0.01, 0.5, 6)},
    "sinks": {"sinks": torch.linspace(-3.0, 6.0, 6)},
    "no-rotation": {"key_transform": KeyTransform(rotate=False)},
    "equalizer": {"key_transform": KeyTransform(equalizer=torch.linspace(0.2, 9.0, 128).view(2, 64))},
}


@pytest.mark.parametrize("max_rows", [1000, 410, 100])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_in_pieces_equals_the_reference(name, max_rows):
    options = OPTIONS[name]
    sizes = {name: x for name, x in options.items() if name == "key_transform"}
    batch = make_batch(LENS, num_heads=6, **sizes)
    if max_rows == 100 and name == "alibi":
        with pytest.raises(ValueError, match="neither a window nor ALiBi"):
            attend(batch, max_rows, softmax_scale=0.125, **options)
        return
    seen = batch.freed_before_window(options["sliding_window"]) if name == "sliding-window" else batch
    got = attend(seen, max_rows if "window" not in name else max_rows + 400, softmax_scale=0.125, **options)
    assert_attention_close(got, batch, softmax_scale=0.125, **options)


def test_decodes_are_left_to_the_other_kernel():
    batch = make_batch([(1, 90), (3, 30), (40, 80)], num_heads=6)
    out, _ = attend(batch, 100, num_decodes=2, softmax_scale=0.125)
    assert out[:4].isnan().all() and out[44:].isnan().all()
    prompt = replace(batch, query=batch.query[4:44])
    want, _ = reference.paged_attention(
        prompt.query,
        prompt.kv_cache,
        batch.block_table[2:],
        batch.seq_lens[2:],
        torch.tensor([0, 40]),
        softmax_scale=0.125,
        cache_format=K8V8,
    )
    torch.testing.assert_close(out[4:44].double(), want, atol=1e-5, rtol=1e-5)


lens = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(lens, st.integers(40, 400))
def test_every_key_is_seen_once(lens, max_rows):
    query_lens, contexts, hidden = zip(*lens, strict=True)
    seq_lens = [query_len + context for query_len, context in zip(query_lens, contexts, strict=True)]
    firsts = [min(x) for x in zip(contexts, hidden, strict=True)]
    groups = prefill.split_batch(query_lens, seq_lens, firsts, max_rows)
    seen: dict[int, list[int]] = {seq: [] for seq in range(len(lens))}
    for stretches in groups:
        assert len(stretches) == 1 or all(len(stretch.keys) == 1 for stretch in stretches)
        for stretch in stretches:
            assert stretch.num_rows <= max_rows
            for seq, keys in enumerate(stretch.keys, stretch.first_seq):
                seen[seq] += range(*keys)
        for seq, (begin, end) in enumerate(stretches[-1].keys, stretches[-1].first_seq):
            assert begin <= contexts[seq] and end == seq_lens[seq], "the last stretch holds the queries' own keys"
    assert all(seen[seq] == list(range(firsts[seq], seq_lens[seq])) for seq in seen)
    assert [stretches[0].first_seq for stretches in groups] == sorted({s[0].first_seq for s in groups})


def test_a_prompt_must_fit_the_workspace():
    with pytest.raises(ValueError, match="sequence 1 has 50 query tokens, the prefill workspace 49 rows"):
        prefill.split_batch([3, 50], [3, 60], [0, 0], 49)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("name", ["plain", "sliding-window", "non-causal", "sinks", "alibi"])
def test_the_library_at_hand(cuda, name, head_size, dtype):
    """FlashAttention's kernel against plain attention over the same dequantized keys and values."""
    attention = varlen_attention.find(cuda, dtype, head_size, alibi=name == "alibi")
    if attention is None:
        pytest.skip("GPU case: no FlashAttention here")
    options = {key: x.to(cuda) if isinstance(x, torch.Tensor) else x for key, x in OPTIONS[name].items()}
    options |= {"softmax_scale": head_size**-0.5}
    batch = make_batch(LENS, num_heads=6, head_size=head_size, dtype=dtype, device=cuda)
    max_rows = 1000 if name in ("sliding-window", "alibi") else 100
    num_tokens = batch.num_tokens
    got, _ = attend(batch, max_rows, attention, **options)
    want, _ = attend(batch, max_rows, **options)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got[:num_tokens], want[:num_tokens], atol=4 * eps, rtol=4 * eps)


def test_flash_attention_of_vllm_is_called_as_it_is_written(monkeypatch):
    """Its extension loads on a GPU only, so its arguments are read from the source and plain attention answers."""
    fa_utils = pytest.importorskip("vllm.v1.attention.backends.fa_utils", reason="needs vLLM")
    source = Path(fa_utils.__file__).parents[3] / "vllm_flash_attn" / "flash_attn_interface.py"
    (function,) = (
        node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
    )
    parameters = {argument.arg for argument in function.args.args}

    def flash_attn_varlen_func(**given):
        assert given.keys() <= parameters
        assert given["fa_version"] == 3 and given["return_softmax_lse"] and len(given["window_size"]) == 2
        call = varlen_attention.VarlenCall(
            query=given["q"],
            key=given["k"],
            value=given["v"],
            out=given["out"],
            query_start_loc=given["cu_seqlens_q"],
            cu_seq_lens=given["cu_seqlens_k"],
            max_query_len=given["max_seqlen_q"],
            max_seq_len=given["max_seqlen_k"],
            window=tuple(given["window_size"]),
            **{name: given[name] for name in ("softmax_scale", "causal", "softcap", "alibi_slopes")},
        )
        return given["out"], plain_attention(call)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", flash_attn_varlen_func, raising=False)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **needs: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    library = varlen_attention.find("cuda", torch.bfloat16, 64)
    batch = make_batch(LENS, num_heads=6)
    got = attend(batch, 100, library, softmax_scale=0.125)
    assert_attention_close(got, batch, softmax_scale=0.125)


def test_pytorch_knows_what_its_flash_attention_is_given():
    arguments = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    assert arguments >= {"scale", "window_size_left", "window_size_right"}


def test_alibi_and_softcap_are_not_for_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(varlen_attention, "_from_vllm", lambda *needs: None)
    assert varlen_attention.find("cuda", torch.float16, 64) is varlen_attention._torch_attention
    assert varlen_attention.find("cuda", torch.float16, 64, alibi=True) is None
    assert varlen_attention.find("cuda", torch.float16, 64, softcap=True) is None


def test_an_older_gpu_has_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert varlen_attention.find("cuda", torch.float16, 64) is None


def test_what_has_no_library():
    for device, dtype, head_size in (
        ("cpu", torch.bfloat16, 64),
        ("cuda", torch.float32, 64),
        ("cuda", torch.float16, 512),
    ):
        assert varlen_attention.find(device, dtype, head_size) is None

"""One test per error text of the operators: the argument, what was expected and what came."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile import gather_args, read_args, write_args

from vllm_int8kv.cache import library, ops
from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.cache.key_transform import KeyTransform

Args = dict[str, Any]


def ints(*values: Any) -> Callable[[Args], torch.Tensor]:
    return lambda args: torch.tensor(values, dtype=torch.int32, device=args["kv_cache"].device)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Args], torch.Tensor]:
    return lambda args: torch.zeros(shape, dtype=dtype, device=args["kv_cache"].device)


def equalizer(make: Callable[[Args], torch.Tensor]) -> Callable[[Args], KeyTransform]:
    return lambda args: KeyTransform(equalizer=make(args))


def changed(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Args], Any]:
    return lambda args: change(args[name])


def every_second(x: torch.Tensor) -> torch.Tensor:
    """The same values, two elements apart."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


# (argument, its bad value made from the good arguments, text)
CACHE_ERRORS = [
    ("kv_cache", zeros(3, 2, 16, 132, dtype=torch.uint8), "kv_cache must be Char, got Byte"),
    ("kv_cache", zeros(3, 2, 16 * 132, dtype=torch.int8), r"kv_cache must be \[num_blocks, .*\], got \[3, 2, 2112\]"),
    (
        "kv_cache",
        zeros(3, 2, 16, 131, dtype=torch.int8),
        "131 bytes per slot, but k8v8 .* head_size 64 takes 132",
    ),
    ("kv_cache", zeros(3, 2, 16, 148, dtype=torch.int8), "kv_cache holds 148 bytes per slot"),  # head_size 72
    ("kv_cache", zeros(3, 2, 16, 0, dtype=torch.int8), "kv_cache holds 0 bytes per slot"),
    ("cache_format", lambda _: replace(K8V8, name="k3v3"), "cache_format 'k3v3' does not exist; supported: k8v8"),
    ("kv_cache", zeros(3, 2, 8, 132, dtype=torch.int8), "block_size that is a positive multiple of 16, got 8"),
    ("kv_cache", zeros(3, 2, 0, 132, dtype=torch.int8), "block_size that is a positive multiple of 16, got 0"),
    ("kv_cache", zeros(3, 2, 16, 164, dtype=torch.int8), "kv_cache holds 164 bytes per slot"),  # head_size 80
    (
        "kv_cache",
        changed("kv_cache", lambda x: x.repeat(1, 1, 1, 2)[..., :132]),
        "contiguously, got strides 264, 1 for slots and bytes; expected 132, 1",
    ),
    ("kv_cache", changed("kv_cache", every_second), "contiguously, got strides 264, 2"),
    ("key_transform", equalizer(zeros(4, 64)), r"key_equalizer must be contiguous \[2, 64\], got \[4, 64\]"),
    ("key_transform", equalizer(zeros(128)), r"key_equalizer must be contiguous \[2, 64\], got \[128\]"),
    ("key_transform", equalizer(lambda args: zeros(64, 2)(args).T), r"key_equalizer must be contiguous \[2, 64\]"),
    ("key_transform", equalizer(zeros(2, 64, dtype=torch.float16)), "key_equalizer must be Float, got Half"),
]
WRITE_ERRORS = [
    *CACHE_ERRORS,
    ("key", zeros(5, 8, 64), "key has 8 KV heads but kv_cache has 2"),
    ("key", zeros(5, 128), r"key must be \[num_tokens, num_heads, head_size\], got \[5, 128\]"),
    ("key", zeros(5, 2, 80), "kv_cache holds 132 bytes per slot, but k8v8 of key's head_size 80 takes 164"),
    (
        "key",
        zeros(5, 2, 72),
        "key has head_size 72, which is not supported; supported: 32 to 256 in steps",
    ),
    ("key", zeros(5, 2, 16), "key has head_size 16, which is not supported"),
    ("key", zeros(5, 2, 272), "key has head_size 272, which is not supported"),
    ("key", zeros(5, 2, 64, dtype=torch.float64), "key must be Float, Half or BFloat16, got Double"),
    ("key", zeros(5, 2, 64, dtype=torch.int8), "key must be Float, Half or BFloat16, got Char"),
    ("key", changed("key", every_second), "key must be contiguous along head_size, got stride 2"),
    ("value", zeros(5, 1, 64), r"value must have the shape of key, \[5, 2, 64\], got \[5, 1, 64\]"),
    ("value", zeros(4, 2, 64), r"value must have the shape of key, \[5, 2, 64\], got \[4, 2, 64\]"),
    ("value", zeros(5, 2, 32), r"value must have the shape of key, \[5, 2, 64\], got \[5, 2, 32\]"),
    ("value", zeros(5, 2, 64, dtype=torch.bfloat16), "value must be Float, got BFloat16"),
    ("value", changed("value", every_second), "value must be contiguous along head_size, got stride 2"),
    ("slot_mapping", ints(0, 1, 2, 3, 4), "slot_mapping must be Long, got Int"),
    ("slot_mapping", zeros(5, 1, dtype=torch.int64), r"slot_mapping must be \[num_tokens\], got \[5, 1\]"),
    ("slot_mapping", zeros(6, dtype=torch.int64), "slot_mapping has 6 entries but key has 5 tokens"),
    ("slot_mapping", changed("slot_mapping", every_second), "slot_mapping must be contiguous"),
]
READ_ERRORS = [
    *CACHE_ERRORS,
    ("query", zeros(4, 3, 64), "query has 3 heads, which is no multiple of the 2 KV heads of kv_cache"),
    ("query", zeros(4, 0, 64), "query has 0 heads, which is no multiple"),
    ("query", zeros(4, 256), r"query must be \[num_tokens, num_heads, head_size\], got \[4, 256\]"),
    ("query", zeros(4, 4, 128), "kv_cache holds 132 bytes per slot, but k8v8 of query's head_size 128 takes 260"),
    ("query", zeros(4, 4, 72), "query has head_size 72, which is not supported"),
    ("query", zeros(4, 4, 64, dtype=torch.float64), "query must be Float, Half or BFloat16, got Double"),
    ("query", changed("query", every_second), "query must be contiguous along head_size, got stride 2"),
    ("out", zeros(4, 2, 64), r"out must have the shape of query, \[4, 4, 64\], got \[4, 2, 64\]"),
    ("out", zeros(4, 4, 64, dtype=torch.float16), "out must be Float, got Half"),
    ("out", changed("query", every_second), "out must be contiguous along head_size, got stride 2"),
    ("block_table", zeros(2, 2, dtype=torch.int64), "block_table must be Int, got Long"),
    ("block_table", ints(0, 1), r"block_table must be \[num_seqs, max_blocks_per_seq\], got \[2\]"),
    ("block_table", ints([0, 1]), "block_table must have num_seqs = 2 rows, got 1"),
    ("block_table", changed("block_table", every_second), "block_table must be contiguous along its last"),
    ("seq_lens", zeros(2, dtype=torch.int64), "seq_lens must be Int, got Long"),
    ("seq_lens", ints([20, 16]), r"seq_lens must be \[num_seqs\], got \[1, 2\]"),
    ("seq_lens", changed("seq_lens", every_second), "seq_lens must be contiguous along its last"),
    ("query_start_loc", zeros(3), "query_start_loc must be Int, got Float"),
    ("query_start_loc", ints([0, 1, 4]), r"query_start_loc must be \[num_seqs \+ 1\], got \[1, 3\]"),
    ("query_start_loc", ints(0, 4), r"query_start_loc must have num_seqs \+ 1 = 3 entries, got 2"),
    ("alibi_slopes", zeros(2), r"alibi_slopes must be contiguous \[4\], got \[2\]"),
    ("alibi_slopes", zeros(4, 1), r"alibi_slopes must be contiguous \[4\], got \[4, 1\]"),
    ("sinks", zeros(5), r"sinks must be contiguous \[4\], got \[5\]"),
    ("sinks", zeros(4, dtype=torch.bfloat16), "sinks must be Float, got BFloat16"),
    ("softmax_scale", lambda _: float("nan"), "softmax_scale must be finite in fp32, got -?nan"),
    ("softmax_scale", lambda _: float("inf"), "softmax_scale must be finite in fp32, got inf"),
    ("softmax_scale", lambda _: 1e300, r"softmax_scale must be finite in fp32, got 1e\+300"),
    ("softcap", lambda _: -1.0, r"softcap must be 0 \(none\) or positive in fp32, got -1"),
    ("softcap", lambda _: float("nan"), r"softcap must be 0 \(none\) or positive in fp32, got -?nan"),
    ("softcap", lambda _: float("inf"), r"softcap must be 0 \(none\) or positive in fp32, got inf"),
    ("softcap", lambda _: 1e-50, r"softcap must be 0 \(none\) or positive in fp32, got 1e-50"),
    ("out", lambda args: torch.zeros(1, 4, 64).expand(4, 4, 64), "out is written and must not be expanded"),
    ("sliding_window", lambda _: 2**31, r"sliding_window must be 0 \(none\) or positive, got 2147483648"),
]
GATHER_ERRORS = [
    *CACHE_ERRORS,
    ("key", zeros(8, 8, 64), "key has 8 KV heads but kv_cache has 2"),
    ("key", zeros(8, 2, 80), "kv_cache holds 132 bytes per slot, but k8v8 of key's head_size 80 takes 164"),
    ("key", zeros(8, 2, 64, dtype=torch.int8), "key must be Float, Half or BFloat16, got Char"),
    ("key", lambda args: torch.zeros(1, 2, 64).expand(8, 2, 64), "key is written and must not be expanded"),
    ("value", zeros(7, 2, 64), r"value must have the shape of key, \[8, 2, 64\], got \[7, 2, 64\]"),
    ("value", zeros(8, 2, 64, dtype=torch.bfloat16), "value must be Float, got BFloat16"),
    ("value", changed("value", every_second), "value must be contiguous along head_size, got stride 2"),
    ("block_table", zeros(2, 2, dtype=torch.int64), "block_table must be Int, got Long"),
    ("block_table", ints([0, 1]), "block_table must have num_seqs = 2 rows, got 1"),
    ("cu_seq_lens", zeros(3), "cu_seq_lens must be Int, got Float"),
    ("cu_seq_lens", ints([0, 4, 7]), r"cu_seq_lens must be \[num_seqs \+ 1\], got \[1, 3\]"),
    ("cu_seq_lens", ints(0, 4), r"cu_seq_lens must have num_seqs \+ 1 = 3 entries, got 2"),
    ("seq_starts", zeros(2, dtype=torch.int64), "seq_starts must be Int, got Long"),
    ("seq_starts", ints([1, 0]), r"seq_starts must be \[num_seqs\], got \[1, 2\]"),
]
# What a kernel on a GPU cannot look at without waiting for it; there the caller vouches.
VALUE_ERRORS = [
    ("block_table", ints([2, 3], [1, 7]), r"block_table\[0, 1\] is 3 but kv_cache has 3 blocks"),
    ("block_table", ints([2, 0], [-1, 7]), r"block_table\[1, 0\] is -1 but kv_cache has 3 blocks"),
    ("block_table", ints([2], [1]), r"seq_lens\[0\] is 20, which takes 2 blocks, but block_table has 1 columns"),
    ("seq_lens", ints(20, 33), r"seq_lens\[1\] is 33, which takes 3 blocks, but block_table has 2 columns"),
    ("seq_lens", ints(20, 2**31 - 1), r"seq_lens\[1\] is 2147483647, which takes 134217728 blocks"),
    ("seq_lens", ints(-1, 16), r"seq_lens\[0\] must not be negative, got -1"),
    ("seq_lens", ints(20, 2), "sequence 1 has 3 query tokens but seq_lens says 2"),
    ("query_start_loc", ints(1, 1, 4), "query_start_loc must start at 0, got 1"),
    ("query_start_loc", ints(0, 2, 1), "query_start_loc must not decrease .* got 2, 1 for sequence 1"),
    ("query_start_loc", ints(0, -1, 4), "query_start_loc must not decrease .* got 0, -1 for sequence 0"),
    ("query_start_loc", ints(0, 1, 5), "query_start_loc must not .* exceed the 4 tokens of query, got 1, 5"),
]

GATHER_VALUE_ERRORS = [
    ("block_table", ints([3, 0], [1, 7]), r"block_table\[0, 0\] is 3 but kv_cache has 3 blocks"),
    ("block_table", ints([2], [1]), r"sequence 0 is gathered up to slot 18, which takes 2 blocks, .* has 1 columns"),
    ("cu_seq_lens", ints(1, 4, 7), "cu_seq_lens must start at 0, got 1"),
    ("cu_seq_lens", ints(0, 4, 2), "cu_seq_lens must not decrease .* got 4, 2 for sequence 1"),
    ("cu_seq_lens", ints(0, 4, 9), "cu_seq_lens must not .* exceed the 8 rows of key, got 4, 9"),
    ("seq_starts", ints(1, -1), r"seq_starts\[1\] must not be negative, got -1"),
    ("seq_starts", ints(1, 2**31 - 1), "sequence 1 is gathered up to slot 2147483650, which takes 134217729 blocks"),
]


def each_error(errors: list) -> pytest.MarkDecorator:
    ids = [f"{index}-{name}" for index, (name, _, _) in enumerate(errors)]
    return pytest.mark.parametrize("name, bad_value, text", errors, ids=ids)


@each_error(WRITE_ERRORS)
def test_reshape_and_cache_refuses(device, name, bad_value, text):
    args = write_args(device)
    with pytest.raises(RuntimeError, match=text):
        ops.reshape_and_cache(**{"cache_format": K8V8, **args, name: bad_value(args)})
    assert not args["kv_cache"].any()


@each_error(READ_ERRORS)
def test_paged_attention_refuses(device, name, bad_value, text):
    args = read_args(device)
    with pytest.raises(RuntimeError, match=text):
        ops.paged_attention(**{"cache_format": K8V8, **args, name: bad_value(args)})


@each_error(GATHER_ERRORS)
def test_gather_cache_refuses(device, name, bad_value, text):
    args = gather_args(device)
    with pytest.raises(RuntimeError, match=text):
        ops.gather_cache(**{"cache_format": K8V8, **args, name: bad_value(args)})
    assert not args["key"].any() and not args["value"].any()


@each_error(GATHER_VALUE_ERRORS)
def test_gather_cache_refuses_on_cpu(name, bad_value, text):
    args = gather_args()
    args |= {"seq_starts": torch.tensor([14, 0], dtype=torch.int32), name: bad_value(args)}
    with pytest.raises(RuntimeError, match=text):
        ops.gather_cache(**args, cache_format=K8V8)
    assert not args["key"].any()


@pytest.mark.parametrize("sliding_window", [0, -1])
def test_paged_attention_refuses_an_empty_window(sliding_window):
    with pytest.raises(ValueError, match=f"sliding_window must be None .* or at least 1, got {sliding_window}"):
        ops.paged_attention(**{**read_args(), "sliding_window": sliding_window}, cache_format=K8V8)


@each_error(VALUE_ERRORS)
def test_paged_attention_refuses_on_cpu(name, bad_value, text):
    args = read_args()
    with pytest.raises(RuntimeError, match=text):
        ops.paged_attention(**{"cache_format": K8V8, **args, name: bad_value(args)})


@pytest.mark.parametrize("slot", [48, 2**31, 2**62])
def test_reshape_and_cache_refuses_a_slot_past_the_end(slot):
    args = write_args()
    args["slot_mapping"][3] = slot
    with pytest.raises(RuntimeError, match=rf"slot_mapping\[3\] is {slot} but kv_cache has 48 slots"):
        ops.reshape_and_cache(**args, cache_format=K8V8)
    assert not args["kv_cache"].any()


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (16,)])
def test_paged_attention_refuses_lse(shape):
    args = read_args()
    order = ("query", "kv_cache", "block_table", "seq_lens", "query_start_loc")
    out, lse = torch.empty(4, 4, 64), torch.empty(shape)
    with pytest.raises(RuntimeError, match=r"lse must be contiguous \[4, 4\]"):
        torch.ops.int8kv.paged_attention(
            out, *(args[name] for name in order), lse, None, None, K8V8.name, True, None, 0.1, True, 0, 0.0
        )


@pytest.mark.parametrize("name", ["query", "block_table", "seq_lens", "query_start_loc"])
def test_paged_attention_refuses_another_device(cuda, name):
    args = read_args(cuda)
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of kv_cache"):
        ops.paged_attention(
            **{**args, name: args[name].cpu(), "out": torch.empty_like(args["query"])}, cache_format=K8V8
        )


@pytest.mark.parametrize("name", ["key", "value", "slot_mapping"])
def test_reshape_and_cache_refuses_another_device(cuda, name):
    args = write_args(cuda)
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of kv_cache"):
        ops.reshape_and_cache(**{**args, name: args[name].cpu()}, cache_format=K8V8)


@pytest.mark.parametrize("name", ["key", "value", "block_table", "cu_seq_lens", "seq_starts"])
def test_gather_cache_refuses_another_device(cuda, name):
    args = gather_args(cuda)
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of kv_cache"):
        ops.gather_cache(**{**args, name: args[name].cpu()}, cache_format=K8V8)


def test_set_cpu_isa_refuses_a_name():
    with pytest.raises(RuntimeError, match="isa 'sse9' is not available on this CPU; available: scalar"):
        library.set_cpu_isa("sse9")
    assert library.cpu_isa() in library.cpu_isas()

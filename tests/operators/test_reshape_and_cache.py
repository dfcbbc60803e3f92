"""Cache writes equal the reference byte for byte, and touch nothing but the mapped slots."""

from typing import Any

import pytest
import torch

from vllm_int8kv.cache import formats, ops, reference
from vllm_int8kv.cache.formats import FORMATS, K8V8, CacheFormat
from vllm_int8kv.cache.key_transform import KeyTransform

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
wide_and_narrow = pytest.mark.parametrize("dtype", DTYPES[::2], ids=["fp32", "bf16"])


def poisoned_cache(
    num_blocks: int, num_kv_heads: int, block_size: int, head_size: int, device: str, cache_format: CacheFormat = K8V8
) -> tuple[torch.Tensor, torch.Tensor]:
    """(storage, cache): random bytes, and a cache inside them with gaps after blocks and heads."""
    content_bytes = cache_format.content_bytes(head_size)
    head_stride = block_size * content_bytes + 16
    block_stride = num_kv_heads * head_stride + 48
    storage = torch.randint(-128, 128, (112 + num_blocks * block_stride,), dtype=torch.int8).to(device)
    shape = (num_blocks, num_kv_heads, block_size, content_bytes)
    return storage, storage.as_strided(shape, (block_stride, head_stride, content_bytes, 1), 112)


def random_kv(num_tokens: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """[2, num_tokens, num_kv_heads, head_size]: K and V as parts of one tensor, so that both are strided."""
    kv = torch.randn(num_tokens, 3 * num_kv_heads, head_size, device=device).to(dtype)
    return kv.unflatten(1, (3, num_kv_heads)).transpose(0, 1)[1:]


def assert_writes_as_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_blocks: int = 10,
    block_size: int = 16,
    cache_format: CacheFormat = K8V8,
    **options: Any,
) -> None:
    """Write with the operator and with the reference into equal poisoned caches; every byte must agree."""
    _, num_kv_heads, head_size = key.shape
    storage, kv_cache = poisoned_cache(num_blocks, num_kv_heads, block_size, head_size, key.device.type, cache_format)
    if cache_format != K8V8:  # what pads the planes of few bits is 0, as in any cache that was allocated
        kv_cache.copy_(cache_format.pack(cache_format.unpack(kv_cache, head_size)))
    want_storage = storage.clone()
    want = want_storage.as_strided(kv_cache.shape, kv_cache.stride(), kv_cache.storage_offset())
    ops.reshape_and_cache(key, value, kv_cache, slot_mapping.to(key.device), **options, cache_format=cache_format)
    reference.reshape_and_cache(key, value, want, slot_mapping.to(key.device), **options, cache_format=cache_format)
    got_planes, want_planes = (cache_format.unpack(cache, head_size) for cache in (kv_cache, want))
    for name, expected in vars(want_planes).items():
        if expected is None:
            continue
        got = getattr(got_planes, name)
        if not name.endswith("codes"):
            got, expected = got.view(torch.int16), expected.view(torch.int16)
        assert torch.equal(got, expected), f"{name}: {int((got != expected).sum())} of {got.numel()} differ"
    assert torch.equal(storage, want_storage), "a byte between the chunks was written"


@each_dtype
@pytest.mark.parametrize("head_size", formats.SUPPORTED_HEAD_SIZES)
def test_head_sizes(kernel, head_size, dtype):
    key, value = random_kv(33, 3, head_size, dtype, kernel)
    assert_writes_as_reference(key, value, torch.arange(5, 38), num_blocks=3)


@wide_and_narrow
@pytest.mark.parametrize("head_size", [32, 64, 80, 128, 512])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "k8v8"])
def test_formats(kernel, name, head_size, dtype):
    """Whole slot groups and single slots; constant, zero and non-finite vectors among the tokens."""
    key, value = random_kv(53, 2, head_size, dtype, kernel)
    if kernel == "cuda" and not FORMATS[name].has_cuda_kernels(head_size):
        with pytest.raises(
            RuntimeError, match=f"'{name}' has CUDA kernels for head sizes up to 128, but key has head_"
        ):
            assert_writes_as_reference(key, value, torch.arange(53), cache_format=FORMATS[name])
        return
    key[2], value[2], key[3], value[3], key[20], value[21] = 0, 0, 1.001, -7.3, torch.nan, torch.inf
    key[22, 0, 5], value[22, 1, 7] = -torch.inf, torch.nan
    key[23], value[23] = 1e-35, -1e-35
    key[24], value[24] = 0.0, -0.0
    key[24, :, ::3], value[24, :, 1::2] = -0.0, 0.0
    for slots in (torch.arange(16, 69), torch.arange(5, 58), SLOTS["padded"](53)):
        for block_size in (16, 48):
            options = dict(num_blocks=160 // block_size + 1, block_size=block_size, cache_format=FORMATS[name])
            assert_writes_as_reference(key, value, slots, **options)


@pytest.mark.parametrize("head_size", [32, 112, 128])
@pytest.mark.parametrize("num_tokens", [1, 9, 30])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8, 17])
def test_kv_heads(kernel, num_kv_heads, num_tokens, head_size):
    key, value = random_kv(num_tokens, num_kv_heads, head_size, torch.bfloat16, kernel)
    assert_writes_as_reference(key, value, torch.arange(5, 5 + num_tokens), num_blocks=3)


def scattered(num_tokens: int) -> torch.Tensor:
    return torch.randperm(160)[:num_tokens]


def padded(num_tokens: int) -> torch.Tensor:
    slots = scattered(num_tokens)
    slots[::3] = -1
    return slots


SLOTS = {
    "aligned": lambda n: torch.arange(16, 16 + n),
    "unaligned": lambda n: torch.arange(3, 3 + n),
    "odd-pairs": lambda n: torch.arange(1, 1 + n).flip(0),
    "scattered": scattered,
    "padded": padded,
    "all-padding": lambda n: torch.full((n,), -1),
    "hole": lambda n: torch.cat([torch.arange(n // 2), torch.full((1,), -7), torch.arange(40 + n // 2, 39 + n)]),
}


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("num_tokens", [1, 7, 16, 33, 100])
def test_slot_mappings(kernel, num_tokens, slots):
    key, value = random_kv(num_tokens, 2, 64, torch.bfloat16, kernel)
    assert_writes_as_reference(key, value, SLOTS[slots](num_tokens))


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
@pytest.mark.parametrize("slots", ["aligned", "scattered", "padded"])
def test_block_sizes(kernel, slots, block_size):
    key, value = random_kv(100, 2, 80, torch.float16, kernel)
    assert_writes_as_reference(key, value, SLOTS[slots](100), num_blocks=160 // block_size + 1, block_size=block_size)


@each_dtype
@pytest.mark.parametrize("equalize", [False, True], ids=["", "equalize"])
@pytest.mark.parametrize("rotate_keys", [False, True], ids=["", "rotate"])
@pytest.mark.parametrize("head_size", [80, 128])
def test_key_transforms(kernel, head_size, rotate_keys, equalize, dtype):
    key_equalizer = 0.1 + 3 * torch.rand(3, head_size, device=kernel) if equalize else None
    key, value = random_kv(21, 3, head_size, dtype, kernel)
    assert_writes_as_reference(
        key,
        value,
        torch.arange(21),
        key_transform=KeyTransform(rotate=rotate_keys, equalizer=key_equalizer),
        num_blocks=2,
    )


@each_dtype
@pytest.mark.parametrize("rotate_keys", [False, True], ids=["", "rotate"])
@pytest.mark.parametrize("head_size", [48, 128])
def test_extreme_values(kernel, head_size, rotate_keys, dtype):
    key, value = random_kv(40, 2, head_size, dtype, kernel)
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    for x in (key, value):
        x[0] = 0.0
        x[1] = -0.0
        x[2, 0, 5] = torch.nan
        x[3] = torch.nan
        x[4, 1, 7], x[4, 1, 8] = torch.inf, -torch.inf
        x[5] = torch.inf
        x[6] = largest
        x[7, :, ::2], x[7, :, 1::2] = largest, -largest
        x[8] = smallest
        x[9] = smallest / 4
        x[10, :, 3] = 1e4
        x[11] *= 1e-4
        x[12] = 1e30 if dtype != torch.float16 else 6e4
        x[13] = 1e-30
        x[14] = torch.arange(head_size, device=kernel) - 24.5  # ties
        x[15] = 127.0
    equalizer = torch.ones(2, head_size, device=kernel)
    equalizer[0, :4] = torch.tensor([1e-38, 1e38, 0.5, 3.0])
    assert_writes_as_reference(key, value, torch.arange(40), key_transform=KeyTransform(rotate=rotate_keys))
    assert_writes_as_reference(
        key, value, torch.arange(40), key_transform=KeyTransform(rotate=rotate_keys, equalizer=equalizer)
    )


def test_values_beside_every_tie(kernel):
    """All 2^7 significands of a scale, at both ends of its range: k + 1/2 steps and its neighbours."""
    steps = torch.arange(128, 256).double() / 128
    ties = (torch.arange(127).double() + 0.5) * steps[:, None]
    for exponent in (-100, 0, 90):
        unit = 2.0**exponent
        tie = (ties * unit).float()
        largest = (127 * steps * unit).float()[:, None]
        for x in (tie, tie.nextafter(torch.tensor(0.0)), tie.nextafter(torch.tensor(torch.inf))):
            vectors = torch.cat([largest, x.clamp(max=largest)], dim=1)[:, None].to(kernel)
            assert_writes_as_reference(vectors, -vectors, torch.arange(128), key_transform=KeyTransform(rotate=False))


def test_value_and_key_may_have_different_strides(kernel):
    key = torch.randn(2, 19, 96, device=kernel).transpose(0, 1)  # head stride above token stride
    value = torch.randn(19, 2, 200, device=kernel)[:, :, 100:196]
    assert key.stride(0) < key.stride(1) and value.stride(1) == 200 and value.storage_offset() == 100
    assert_writes_as_reference(key, value, torch.arange(19))


def test_one_token_at_a_time_equals_all_at_once(kernel):
    key, value = random_kv(37, 2, 64, torch.bfloat16, kernel)
    slots = torch.arange(2, 39, device=kernel)
    _, kv_cache = poisoned_cache(3, 2, 16, 64, kernel)
    at_once = kv_cache.clone()
    ops.reshape_and_cache(key, value, at_once, slots, cache_format=K8V8)
    for token in range(37):
        part = slice(token, token + 1)
        ops.reshape_and_cache(key[part], value[part], kv_cache, slots[part], cache_format=K8V8)
    assert torch.equal(kv_cache, at_once)


@pytest.mark.parametrize("num_tokens", [5, 100, 1000])
def test_threads_change_nothing(kernel, set_num_threads, num_tokens):
    """Neighbouring slots share bytes of a cache line, so two threads must not split a block between them."""
    key, value = random_kv(num_tokens, 3, 64, torch.float32, kernel)
    slots = torch.arange(7, 7 + num_tokens, device=kernel)
    caches = []
    for num_threads in (1, 2, 2):
        set_num_threads(num_threads)
        caches.append(K8V8.allocate(64, 3, 16, 64, kernel))
        ops.reshape_and_cache(key, value, caches[-1], slots, cache_format=K8V8)
    assert torch.equal(caches[0], caches[1]) and torch.equal(caches[0], caches[2])


def test_offsets_beyond_32_bits(kernel):
    num_blocks = 2**32 // (8 * 128 * 260) + 2
    kv_cache = torch.empty(num_blocks, 8, 128, 260, dtype=torch.int8, device=kernel)  # touched at its ends only
    key, value = random_kv(2, 8, 128, torch.bfloat16, kernel)
    slots = torch.tensor([5, num_blocks * 128 - 3], device=kernel)
    ops.reshape_and_cache(key, value, kv_cache, slots, cache_format=K8V8)
    for token, block in ((0, 0), (1, num_blocks - 1)):
        want = torch.zeros_like(kv_cache[:1])
        reference.reshape_and_cache(
            key[token : token + 1], value[token : token + 1], want, slots[token, None] % 128, cache_format=K8V8
        )
        got, want = K8V8.unpack(kv_cache[block, None]), K8V8.unpack(want)
        offset = int(slots[token]) % 128
        assert torch.equal(got.k_codes[0, :, offset], want.k_codes[0, :, offset])
        assert torch.equal(got.v_codes[0, :, offset], want.v_codes[0, :, offset])
        assert torch.equal(got.v_scales[0, :, offset], want.v_scales[0, :, offset])

"""Entropy coding of integers: nothing is lost, whatever they are, and what is short stays short."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_int8kv.store import entropy

MIN, MAX = -(2**31), 2**31 - 1
INTEGERS = st.one_of(
    st.integers(-2, 2),
    st.integers(-200, 200),
    st.integers(-40000, 40000),
    st.sampled_from([127, -127, 128, -128, 32767, -32767, 32768, -32768, MIN, MAX]),
)


def encode(integers: np.ndarray) -> bytes:
    (data,) = entropy.encode(torch.from_numpy(integers)[None])
    return data


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 24), st.integers(1, 40)).flatmap(
        lambda shape: arrays.arrays(np.int32, shape, elements=INTEGERS, fill=st.nothing())
    )
)
def test_integers_come_back(integers):
    data = encode(integers)
    payloads = [memoryview(data + b"what follows"), memoryview(data)]
    found, rests = entropy.Decoder(*integers.shape).decode(payloads)
    assert [bytes(rest) for rest in rests] == [b"what follows", b""]
    assert (found.numpy() == integers).all()
    assert found.dtype == (torch.int16 if np.abs(integers.astype(np.int64)).max() <= 32767 else torch.int32)


@pytest.mark.parametrize("mean", [0, 100, 16380, 16390, 20000, -20000, 32767, -32768, 10**6, MIN, MAX])
@pytest.mark.parametrize("spread", [0, 1, 60, 3000])
def test_channels_come_back_wherever_they_lie(spread, mean):
    """Their mean has 14 bits; what is farther away is near it all the same."""
    noise = np.random.default_rng(0).integers(-spread, spread + 1, (3, 32))
    integers = (mean + noise).clip(MIN, MAX).astype(np.int32)
    found, _ = entropy.Decoder(*integers.shape).decode([memoryview(encode(integers))])
    assert (found.numpy() == integers).all()
    if np.abs(integers.astype(np.int64)).max() <= 32767:
        assert encode(integers.astype(np.int16)) == encode(integers)


@pytest.mark.parametrize("mean", [0, 5])
@pytest.mark.parametrize("scale", [2, 30, 1000])
def test_channels_of_other_spread_and_mean_take_other_bytes(scale, mean):
    """Within 15 % of the entropy of normal variates of each channel's spread, headers included, wherever they lie."""
    rng = np.random.default_rng(0)
    spread = scale * 2 ** rng.uniform(-1, 1, size=(2000, 1))
    means = mean * spread * rng.standard_normal((2000, 1))
    integers = np.round(means + rng.standard_normal((2000, 64)) * spread).astype(np.int32)
    ideal = (np.log2(spread) + np.log2(2 * np.pi * np.e) / 2).sum() * 64 / 8
    assert len(encode(integers)) < 1.15 * ideal


@pytest.mark.parametrize("change", [0, 9, 60, 200, -1])
def test_other_bytes_are_none(change):
    """They are refused or other integers; a file has a checksum beside."""
    data = bytearray(encode(np.arange(-300, 300, dtype=np.int32).reshape(20, 30)))
    data[change] ^= 0x55
    try:
        entropy.Decoder(20, 30).decode([memoryview(data)])
    except entropy.ERRORS:
        return


@pytest.mark.parametrize("shape", [(20, 31), (19, 30), (600, 1)])
def test_other_shapes_are_refused(shape):
    data = encode(np.zeros((20, 30), np.int32))
    with pytest.raises(ValueError, match=r"\[20, 30\] integers"):
        entropy.Decoder(*shape).decode([memoryview(data)])

"""Inputs of layers without an engine: their codecs, and what is kept of them between steps."""

import pytest
import torch

from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.engine.contents import Block, Written
from vllm_int8kv.store.engine.staging import Staging
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.inputs.factors import Factors
from vllm_int8kv.store.inputs.latents import Basis
from vllm_int8kv.store.inputs.layers import InputLayer
from vllm_int8kv.store.registry import INPUT_CODECS, make_input_codec

BLOCK_SIZE, NUM_BLOCKS, NUM_LAYERS, HIDDEN = 32, 4, 5, 192
CODECS = (*INPUT_CODECS, "x+zstd", "xcl4+zstd", "xbound:0.02", "xbound:0.2", "xsvd:0.02", "xsvd:0.2")
RANK = 96
"""Of the weights of K and V."""


@pytest.fixture
def make(tmp_path):
    """Codecs by name, each of a namespace of its own."""
    return lambda name, layers=None: make_input_codec(name, layers or make_layers(), tmp_path / name, metrics())


def make_layers(dtype: torch.dtype = torch.bfloat16) -> list[InputLayer]:
    return [InputLayer(f"layer {number}", HIDDEN, BLOCK_SIZE, dtype) for number in range(NUM_LAYERS)]


def weights() -> list[torch.Tensor]:
    """Of K and V of every layer, `[rows, hidden_size]`; some of them count ten times as much as others."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(RANK, HIDDEN, generator=generator) * torch.logspace(-0.5, 0.5, RANK)[:, None]
        for _ in range(NUM_LAYERS)
    ]


def metrics() -> list[torch.Tensor]:
    return [own.T @ own for own in weights()]


def inputs(dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Of layers that have much in common, with some channels ten times as wide as the others."""
    generator = torch.Generator().manual_seed(3)
    shape = (NUM_BLOCKS, BLOCK_SIZE, HIDDEN)
    width = torch.where(torch.rand(HIDDEN, generator=generator) < 0.05, 10.0, 1.0)
    x, found = torch.randn(shape, generator=generator) * width, []
    for _ in range(NUM_LAYERS):
        x = x + 0.2 * torch.randn(shape, generator=generator) * width
        found.append(x.to(dtype))
    return found


def restored(codec: Codec, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [part.reshape(NUM_BLOCKS, BLOCK_SIZE, HIDDEN) for part in codec.decode(codec.encode(parts))]


def relative_errors(codec: Codec, parts: list[torch.Tensor]) -> list[float]:
    """By layer."""
    found = restored(codec, parts)
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(found, parts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["x", "x+zstd"])
def test_inputs_come_back_bit_for_bit(make, name, dtype):
    codec = make(name, make_layers(dtype))
    for got, want in zip(restored(codec, inputs(dtype)), inputs(dtype), strict=True):
        assert got.dtype == dtype and torch.equal(got, want)


@pytest.mark.parametrize("family", ["x", "xcl"])
def test_every_bit_halves_the_error(make, family):
    eight, six, four = (relative_errors(make(f"{family}{bits}"), inputs()) for bits in (8, 6, 4))
    assert max(eight) < 0.007
    for place in range(3 if family == "xcl" else 0, NUM_LAYERS):
        assert 3.5 < six[place] / eight[place] < 5
        assert 3.5 < four[place] / six[place] < 5


def test_what_layers_have_in_common_is_stored_once(make):
    """The second layer on differs from the one before by a fifth."""
    plain, across = relative_errors(make("x4"), inputs()), relative_errors(make("xcl4"), inputs())
    assert across[3] < plain[3] / 2.5 and across[4] < plain[4] / 2.5
    sizes = {name: len(make(name).encode(inputs())[0]) for name in ("xbound:0.15", "x4")}
    errors = relative_errors(make("xbound:0.15"), inputs())
    assert sizes["xbound:0.15"] < sizes["x4"] and max(errors) < min(plain)


def test_errors_do_not_add_up_over_the_layers(make):
    found = relative_errors(make("xbound:0.1"), inputs())
    assert max(found) < 1.5 * min(found)


@pytest.mark.parametrize("relative_step", [0.01, 0.1, 1.0])
def test_the_bound_holds_for_every_element(make, tmp_path, relative_step):
    """Half a step, which is R times the root mean square of the equalized inputs of a token."""
    name, parts = f"xbound:{relative_step}", inputs()
    found = restored(make(name), parts)
    factors = Factors.read(tmp_path / name)
    for got, want, equalizer in zip(found, parts, factors.equalizers, strict=True):
        scaled = want.float() * equalizer
        bound = relative_step / 2 * scaled.square().mean(dim=-1, keepdim=True).sqrt()
        error = ((got - want.float()) * equalizer).abs()
        assert (error <= bound * (1 + 2**-8) + 1e-5 * scaled.abs()).all()  # the step is bf16
        assert error.max() > 0.9 * bound.min()  # it is used


def test_what_k_and_v_do_not_see_is_not_stored(make, tmp_path):
    """In the coordinates of the singular vectors every element is within half a step of its token."""
    codec, parts = make("xsvd:0.05"), inputs()
    found = restored(codec, parts)
    basis = Basis.read(tmp_path / "xsvd:0.05")
    assert [len(own) for own in basis.singular_values] == [RANK] * NUM_LAYERS
    for got, want, weight, values, vectors in zip(
        found, parts, weights(), basis.singular_values, basis.vectors, strict=True
    ):
        latents = want.float() @ vectors.T * values
        bound = 0.05 / 2 * latents.square().mean(dim=-1, keepdim=True).sqrt()
        error = ((got - want.float()) @ vectors.T * values).abs()
        rounded = 1e-3 * latents.abs().amax(dim=-1, keepdim=True)  # vectors of fp16
        assert (error <= bound * (1 + 2**-8) + rounded).all()
        assert error.max() > 0.9 * bound.min()
        torch.testing.assert_close(weight.norm(), values.norm())
        assert (
            ((got - want.float()) @ weight.T).norm() / (want.float() @ weight.T).norm()
        ).item() < 0.05 / 12**0.5 * 1.1
    assert ((found[0] - parts[0]).norm() / parts[0].norm()).item() > 0.5
    sizes = {name: len(make(name).encode(parts)[0]) for name in ("xsvd:0.05", "xbound:0.05")}
    assert sizes["xsvd:0.05"] < 0.75 * sizes["xbound:0.05"]


def test_an_odd_rank_and_none(tmp_path):
    layers = [InputLayer("one", 64, 16, torch.float32), InputLayer("two", 64, 16, torch.float32)]
    weight = torch.randn(7, 64)
    codec = make_input_codec("xsvd:0.01", layers, tmp_path, [weight.T @ weight, torch.zeros(64, 64)])
    x = torch.randn(2, 2, 16, 64)
    first, second = codec.decode(codec.encode(list(x)))
    assert (((first - x[0]) @ weight.T).norm() / (x[0] @ weight.T).norm()).item() < 0.01
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("name", CODECS)
def test_blocks_do_not_depend_on_their_company(make, name):
    codec, parts = make(name), inputs()
    together = codec.encode(parts)
    for number in range(NUM_BLOCKS):
        (alone,) = codec.encode([part[number : number + 1] for part in parts])
        assert bytes(alone) == bytes(together[number])


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_of_something_else_is_a_bad_file(make, name):
    codec = make(name)
    payload = bytes(codec.encode(inputs())[0])
    for other in (b"", payload[:8], payload[: len(payload) // 2], payload + b"0", b"no payload" * 1000):
        with pytest.raises(BadFile):
            codec.decode([other])


@pytest.mark.parametrize("name", [name for name in CODECS if not name.startswith("x+") and name != "x"])
def test_inputs_that_are_no_numbers_do_not_spread(make, name):
    codec, parts = make(name, make_layers(torch.float32)), inputs(torch.float32)
    codec.encode(parts)
    parts[1][0, 5, 7] = torch.nan
    parts[1][0, 6, 8] = torch.inf
    found = restored(codec, parts)
    assert all(torch.isfinite(part).all() for part in found)
    if not name.startswith("xsvd"):  # of which only what K and V see comes back
        assert ((found[1] - parts[1])[0, 7:].norm() / parts[1][0, 7:].norm()).item() < 0.3
    seen = [part[1][0, 7:] @ weights()[1].T for part in (found, parts)]
    assert ((seen[0] - seen[1]).norm() / seen[1].norm()).item() < 0.3


def test_sizes(make):
    """Codes, a scale of two bytes per token, below 8 bits a midpoint; the digest of the factors."""
    sizes = {name: len(make(name).encode(inputs())[0]) for name in INPUT_CODECS}
    tokens = BLOCK_SIZE * NUM_LAYERS
    assert sizes["x"] == tokens * 2 * HIDDEN
    assert sizes["x8"] == sizes["xcl8"] == tokens * (HIDDEN + 2) + 8
    assert sizes["x6"] == tokens * (HIDDEN * 6 // 8 + 4) + 8
    assert sizes["x4"] == tokens * (HIDDEN // 2 + 4) + 8
    assert sizes["xcl4"] == BLOCK_SIZE * (3 * (HIDDEN + 2) + 2 * (HIDDEN // 2 + 4)) + 8


@pytest.mark.parametrize(("hidden_size", "groups"), [(576, 3), (4096, 16), (2560, 10), (96, 1), (64, 1), (448, 7)])
def test_groups_of_channels(tmp_path, hidden_size, groups):
    layer = InputLayer("layer", hidden_size, 16, torch.float32)
    codec = make_input_codec("x8", [layer], tmp_path)
    x = torch.randn(2, 16, hidden_size)
    assert len(codec.encode([x])[0]) == 16 * (hidden_size + 2 * groups) + 8
    (got,) = codec.decode(codec.encode([x]))
    assert ((got - x).norm() / x.norm()).item() < 0.01


def test_engines_take_over_the_factors_of_the_first(make, tmp_path):
    first = make("xcl8")
    payload = first.encode(inputs())[0]
    other = [part[:1] * 7 for part in inputs()]
    assert bytes(make("xcl8").encode(inputs())[0]) == bytes(payload)
    assert torch.equal(make("xcl8").decode([payload])[4], first.decode([payload])[4])
    (tmp_path / "xcl8" / Factors.name).unlink()
    with pytest.raises(BadFile, match="is gone, which says how to read it"):
        make("xcl8").decode([payload])
    late = make("xcl8")
    late.encode(other)
    with pytest.raises(BadFile, match=r"made with other input_factors\.npz"):
        late.decode([payload])
    (tmp_path / "xcl8" / Factors.name).write_bytes(b"no array")
    with pytest.raises(BadFile, match="cannot be read"):
        make("xcl8").encode(inputs())


def test_the_factors_of_a_faster_engine_stay(tmp_path):
    for scale in (1, 9):
        Factors.measure([scale * part for part in inputs()], across_layers=True).write(tmp_path)
    found, want = Factors.read(tmp_path), Factors.measure(inputs(), across_layers=True)
    assert torch.equal(found.equalizers, want.equalizers) and found.digest == want.digest
    assert [path.name for path in tmp_path.iterdir()] == [Factors.name]


class Steps:
    """A cache of 8 blocks of 4 tokens with 2 layers whose inputs are known by their token."""

    def __init__(self, capacity: int = 8) -> None:
        self.staging = Staging(2, 4, 3, torch.float32, num_blocks=8, capacity=capacity)

    def step(self, *chunks: tuple[str, list[int], int, int], padding: int = 0, base: int = 0) -> None:
        """One forward pass.

        Args:
            chunks: request, its block ids, first token, tokens.
        """
        written, rows, slots = {}, [], []
        for request, blocks, begin, count in chunks:
            for place in range(begin // 4, -(-(begin + count) // 4)):
                written[blocks[place]] = Written(request, place)
            rows += [base + token for token in range(begin, begin + count)]
            slots += [blocks[token // 4] * 4 + token % 4 for token in range(begin, begin + count)]
        self.staging.begin_step(written)
        x = torch.tensor([*rows, *[-5] * padding], dtype=torch.float32)[:, None].expand(-1, 3)
        slot_mapping = torch.tensor(slots + [-1] * padding)
        for layer in range(2):
            self.staging.add(layer, x + 100 * layer, slot_mapping)

    def take(self, *blocks: tuple[int, int]) -> dict[int, list[float]]:
        found, inputs = self.staging.take([Block(f"hash {i}", i, place) for i, place in blocks])
        assert inputs.shape == (len(found), 2, 4, 3)
        assert torch.equal(inputs[:, 1], inputs[:, 0] + 100)
        return {block.block_id: inputs[number, 0, :, 0].tolist() for number, block in enumerate(found)}


def test_a_block_is_whole_when_its_last_token_is_computed():
    steps = Steps()
    steps.step(("a", [3, 5], 0, 3), ("b", [2], 0, 2), padding=2)
    assert steps.take((3, 0), (2, 0)) == {}
    steps.step(("b", [2], 2, 1), ("a", [3, 5], 3, 3))
    assert steps.take((3, 0), (5, 1), (2, 0)) == {3: [0, 1, 2, 3]}
    steps.step(("b", [2], 3, 1), ("a", [3, 5], 6, 2))
    assert steps.take((5, 1), (2, 0)) == {5: [4, 5, 6, 7], 2: [0, 1, 2, 3]}
    assert steps.take((5, 1)) == {}


def test_refused_drafts_are_overwritten():
    steps = Steps()
    steps.step(("a", [1], 0, 4), base=50)  # of which two are refused
    steps.step(("a", [1], 2, 2))
    assert steps.take((1, 0)) == {1: [50, 51, 2, 3]}


def test_a_block_of_another_request_begins_anew():
    steps = Steps()
    steps.step(("a", [1], 0, 3))
    steps.step(("b", [1], 0, 2), base=10)
    steps.step(("b", [1], 2, 1), base=10)
    assert steps.take((1, 0)) == {}
    steps.step(("b", [1], 3, 1), base=10)
    assert steps.take((1, 1)) == {}  # of another place
    assert steps.take((1, 0)) == {1: [10, 11, 12, 13]}


def test_a_block_whose_beginning_was_not_seen_is_never_whole():
    steps = Steps()
    steps.step(("a", [1], 2, 2))
    assert steps.take((1, 0)) == {}


def test_a_pool_that_is_full_keeps_what_it_has():
    steps = Steps(capacity=2)
    steps.step(("a", [1, 2, 3], 0, 12))
    assert steps.take((1, 0), (2, 1), (3, 2)) == {1: [0, 1, 2, 3], 2: [4, 5, 6, 7]}
    steps.step(("b", [4], 0, 4))
    assert steps.take((4, 0)) == {4: [0, 1, 2, 3]}


def test_requests_that_end_leave_nothing():
    steps = Steps(capacity=1)
    steps.step(("a", [1], 0, 3))
    steps.staging.forget({"a"})
    steps.step(("b", [2], 0, 4))
    assert steps.take((2, 0)) == {2: [0, 1, 2, 3]}

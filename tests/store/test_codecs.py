"""Codecs: exact bytes, the operators' own requantization, and bounds that hold for every element."""

from dataclasses import replace

import pytest
import torch

from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.cache.key_transform import KeyTransform
from vllm_int8kv.store.bounded import Bounded, Reader
from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.files import BadFile
from vllm_int8kv.store.options import StoreOptions
from vllm_int8kv.store.pages import PagedLayer, copy_in, copy_out, read_pages, write_pages
from vllm_int8kv.store.registry import check_codec, make_codec

BLOCK_SIZE, NUM_BLOCKS, HEADS = 32, 6, 3
CODECS = ("exact", "exact+zstd", "k8v8", "k6v4", "k6v4+zstd", "k4v4", "k2v2", "k2v2+zstd", "bound:0.1", "bound:0.5")


def values(head_size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with channels of very different spread, and values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_BLOCKS * BLOCK_SIZE, HEADS, head_size)
    key, value = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return key * torch.exp2(torch.randn(HEADS, head_size, generator=generator).round() * 2), value


def make_layers(cache_format: str = "k8v8") -> list[PagedLayer]:
    """Two layers with the cache of this project, of different shapes, and one of vLLM's own."""
    layers = []
    for number, head_size in enumerate((64, 80)):
        key, value = values(head_size, number)
        transform = KeyTransform(equalizer=torch.exp2(torch.randint(-2, 3, (HEADS, head_size)).float()))
        options = {"cache_format": FORMATS[cache_format], "key_transform": transform}
        pages = write_pages((key, value), NUM_BLOCKS, BLOCK_SIZE, options["cache_format"], transform)
        options |= {"head_size": head_size, "num_kv_heads": HEADS}
        layers.append(PagedLayer(f"layer {number}", pages, BLOCK_SIZE, **options))
    native = torch.randn(2, NUM_BLOCKS, HEADS, BLOCK_SIZE, 64).bfloat16().movedim(1, 0)
    return [*layers, PagedLayer("layer 2", native, block_size=0)]


def restored(codec: Codec, pages: list[torch.Tensor]) -> list[torch.Tensor]:
    return [
        own.view(layer.pages.dtype).reshape(-1, *layer.pages.shape[1:])
        for layer, own in zip(codec.layers, codec.decode(codec.encode(pages)), strict=True)
    ]


@pytest.mark.parametrize("name", ["exact", "exact+zstd", "k8v8"])
def test_pages_come_back_bit_for_bit(name):
    codec = make_codec(name, make_layers())
    pages = copy_out(codec.layers, [4, 0, 2])
    for got, want in zip(restored(codec, pages), pages, strict=True):
        assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("served", FORMATS)
def test_compressed_pages_come_back_bit_for_bit(served):
    """Of every format: with scales of any magnitude, which may be that of all tokens, and midpoints of both signs."""
    layers = make_layers(served)
    for layer in layers[:2]:
        planes = layer.cache_format.unpack(layer.pages, layer.head_size)
        for side in (planes.keys, planes.values):
            side.scales.mul_(torch.exp2(torch.randint(-60, 60, side.scales.shape).float()))
            side.scales[4], side.scales[0] = 0, 2.0**100
        layer.pages.copy_(layer.cache_format.pack(planes))
    exact = make_codec("exact+zstd", layers)
    pages = copy_out(layers, [4, 0, 2])
    for got, want in zip(restored(exact, pages), pages, strict=True):
        assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("formats", [["k8v8"] * 3, ["k4v4"] * 2 + ["k8v8"] * 2 + ["k6v4", "k8v8"]])
def test_compressed_pages_of_many_layers_come_back_bit_for_bit(formats):
    """Layers one behind the other that are alike are decoded together; no two of these hold the same."""
    layers = [
        replace(make_layers(name)[0], name=f"layer {number:02}", pages=make_layers(name)[0].pages.roll(number, dims=0))
        for number, name in enumerate(formats)
    ]
    pages = copy_out(layers, [4, 0, 2])
    for got, want in zip(restored(make_codec("exact+zstd", layers), pages), pages, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["k6v4", "k4v4", "k2v2"])
def test_compression_loses_nothing(name):
    layers = make_layers()
    pages = copy_out(layers, [1, 5])
    plain, compressed = (restored(make_codec(f"{name}{suffix}", layers), pages) for suffix in ("", "+zstd"))
    for got, want in zip(compressed, plain, strict=True):
        assert torch.equal(got.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("served", ["k8v8", "k6v4"])
@pytest.mark.parametrize("name", ["k6v4", "k4v4+zstd", "k2v2"])
def test_fewer_bits_are_what_the_format_keeps(name, served):
    """K and V through the cache's format, the codec's and the cache's again, each by the reference."""
    codec = make_codec(name, make_layers(served))
    pages = copy_out(codec.layers, list(range(NUM_BLOCKS)))
    for layer, own, got in zip(codec.layers[:2], pages, restored(codec, pages), strict=False):
        stored = FORMATS[name.removesuffix("+zstd")]
        if stored.name == served:
            assert torch.equal(got, own)
            continue
        as_they_lie = KeyTransform(rotate=False)
        key, value = read_pages(own, layer.cache_format, as_they_lie, layer.head_size)
        kv = stored.round_trip_k(key), stored.round_trip_v(value)
        assert torch.equal(got, write_pages(kv, NUM_BLOCKS, BLOCK_SIZE, layer.cache_format, as_they_lie))


@pytest.mark.parametrize("relative_step", [0.01, 0.1, 1.0])
def test_the_bound_holds_for_every_element(relative_step):
    codec = make_codec(f"bound:{relative_step}", make_layers())
    assert isinstance(codec, Bounded)
    equalized = KeyTransform()
    kv = [read_pages(layer.pages, layer.cache_format, equalized, layer.head_size) for layer in codec.layers[:2]]
    reader = Reader([x[0].numel() for pair in kv for x in pair], BLOCK_SIZE)
    multiples, _ = reader.read([memoryview(block) for block in codec.quantize(kv, NUM_BLOCKS).payloads()])
    found = list(codec.dequantize(multiples))
    for pair, got in zip(kv, found, strict=True):
        for x, y in zip(pair, got, strict=True):
            rms = x.flatten(1).square().mean(dim=1).sqrt()
            error = (y - x).flatten(1).abs().amax(dim=1)
            assert (error <= relative_step / 2 * rms * (1 + 2**-8)).all()  # the step is bf16
            assert (error >= relative_step / 4 * rms).all()  # it is used


def test_multiples_beyond_a_byte_survive():
    layers = make_layers()
    key, value = values(64, 0)
    key[40, 1, 7], value[41, 2, 9] = 3e4, -2e4
    spiky = write_pages((key, value), NUM_BLOCKS, BLOCK_SIZE, layers[0].cache_format, layers[0].key_transform)
    layers[0].pages.copy_(spiky)
    codec = make_codec("bound:0.01", layers)
    pages = copy_out(codec.layers, [1])
    expected, got = (
        read_pages(own, layers[0].cache_format, layers[0].key_transform, 64)
        for own in (pages[0], restored(codec, pages)[0])
    )
    assert got[0][8, 1, 7].item() == pytest.approx(expected[0][8, 1, 7].item(), rel=1e-2)
    assert got[1][9, 2, 9].item() == pytest.approx(expected[1][9, 2, 9].item(), rel=1e-2)


@pytest.mark.parametrize("name", CODECS)
def test_blocks_do_not_depend_on_their_company(name):
    codec = make_codec(name, make_layers())
    together = codec.encode(copy_out(codec.layers, [1, 3, 5]))
    for number, block in enumerate((1, 3, 5)):
        (alone,) = codec.encode(copy_out(codec.layers, [block]))
        assert bytes(alone) == bytes(together[number])


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_of_something_else_is_a_bad_file(name):
    codec = make_codec(name, make_layers())
    (payload,) = codec.encode(copy_out(codec.layers, [0]))
    for other in (b"", bytes(payload)[: len(payload) // 2], b"no payload" * 1000):
        with pytest.raises(BadFile):
            codec.decode([other])


def test_pages_are_written_where_they_belong():
    layers = make_layers()
    before = [layer.pages.clone() for layer in layers]
    pages = copy_out(layers, [0, 1])
    copy_in(layers, [5, 3], pages)
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.pages[5], old[0]) and torch.equal(layer.pages[3], old[1])
        assert torch.equal(layer.pages[[0, 1, 2, 4]], old[[0, 1, 2, 4]])


def test_the_more_is_lost_the_less_is_stored():
    layers = make_layers()[:2]
    sizes = {name: len(make_codec(name, layers).encode(copy_out(layers, [0]))[0]) for name in CODECS}
    assert sizes["k2v2"] < sizes["k4v4"] < sizes["k6v4"] < sizes["exact"]
    assert sizes["k6v4+zstd"] < sizes["k6v4"]
    assert sizes["k2v2+zstd"] < sizes["k2v2"] and sizes["bound:0.5"] < sizes["bound:0.1"] < sizes["exact"]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("zip", "codec must be exact, a cache format"),
        ("k7v7", "codec must be exact, a cache format"),
        ("bound:2", r"codec bound:R needs R from 0\.001 to 1"),
        ("bound:", r"codec bound:R needs R from 0\.001 to 1"),
        ("bound:0.1+zstd", "it compresses already"),
    ],
)
def test_names_of_no_codec_are_refused(name, problem):
    with pytest.raises(ValueError, match=problem):
        check_codec(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_floats_are_compressed_by_their_exponents(dtype):
    """Normal variates have exponents of 2.6 bits and a sign in place of 9, or 6 in fp16."""
    pages = torch.randn(NUM_BLOCKS, 2, HEADS, BLOCK_SIZE, 64).to(dtype)
    layers = [PagedLayer("layer", pages, block_size=0)]
    codec = make_codec("exact+zstd", layers)
    (payload,) = codec.encode(copy_out(layers, [3]))
    (got,) = restored(codec, copy_out(layers, [3]))
    assert torch.equal(got, pages[3:4])
    saved = {torch.bfloat16: 4.5, torch.float32: 4.5, torch.float16: 1.0}[dtype]
    assert len(payload) < pages[3].nbytes - saved / 8 * pages[3].numel()


def test_caches_of_vllm_are_stored_as_they_are():
    native = make_layers()[2:]
    assert make_codec("exact", native).layers == native
    with pytest.raises(ValueError, match="codec 'k6v4' needs kv_cache_dtype='int8_custom'"):
        make_codec("k6v4", native)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, 'needs "path", the folder of the store, got None'),
        ({"path": 3}, 'needs "path", the folder of the store, got 3'),
        ({"path": "/x", "size": 1}, "has no option 'size'; expected some of codec, max_bytes, max_queued_bytes, path"),
        ({"path": "/x", "max_bytes": "1GB"}, "\"max_bytes\" must be a number of bytes from 1,048,576 on, got '1GB'"),
        ({"path": "/x", "max_queued_bytes": None}, '"max_queued_bytes" must be a number of bytes'),
        ({"path": "/x", "codec": 4}, '"codec" must be a name, got 4'),
        ({"path": "/x", "codec": "lz4"}, "codec must be exact"),
    ],
)
def test_wrong_options_get_words(options, problem):
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        StoreOptions.from_mapping(options)

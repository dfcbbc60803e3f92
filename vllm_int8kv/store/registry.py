"""The codecs by name."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.store.bounded import Bounded, parse_bound
from vllm_int8kv.store.codecs import Codec, Exact, PageCodec, Requantized, without_format
from vllm_int8kv.store.compressed import Compressed, CompressedPages
from vllm_int8kv.store.inputs.codecs import FIRST_BITS, BoundedInputs, ExactInputs, QuantizedInputs
from vllm_int8kv.store.inputs.factors import Factors
from vllm_int8kv.store.inputs.kept import KeptInFolder
from vllm_int8kv.store.inputs.latents import Basis, LatentInputs
from vllm_int8kv.store.inputs.layers import InputLayer
from vllm_int8kv.store.pages import PagedLayer

EXACT, EXACT_INPUTS = "exact", "x"
BOUND, INPUT_BOUND, LATENT_BOUND = "bound:", "xbound:", "xsvd:"
ZSTD = "+zstd"
"""What a codec's name ends with if its payload is compressed in the end."""
INPUT_BITS = {"x8": 8, "x6": 6, "x4": 4}
CROSS_LAYER_BITS = {"xcl8": 8, "xcl6": 6, "xcl4": 4}
"""Of what is left of a layer's inputs when those of the layer before have been subtracted."""
INPUT_CODECS = (EXACT_INPUTS, *INPUT_BITS, *CROSS_LAYER_BITS)


def stores_inputs(name: object) -> bool:
    """Whether a codec is one of the inputs of layers in place of their K and V."""
    return isinstance(name, str) and (
        name.removesuffix(ZSTD) in INPUT_CODECS or name.startswith((INPUT_BOUND, LATENT_BOUND))
    )


def needs_metrics(name: str) -> bool:
    """Whether a codec of inputs must know what their K and V are made of, see `make_input_codec`."""
    return name.startswith(LATENT_BOUND)


def check_codec(name: str) -> None:
    """Raise ValueError unless a codec is called so."""
    base = name.removesuffix(ZSTD)
    if base.startswith((BOUND, INPUT_BOUND, LATENT_BOUND)):
        parse_bound(base)
        if name.endswith(ZSTD):
            raise ValueError(f"codec {name!r}: it compresses already; leave {ZSTD} out")
    elif base not in (EXACT, *FORMATS, *INPUT_CODECS):
        raise ValueError(
            f"codec must be exact, a cache format ({', '.join(FORMATS)}), inputs of layers "
            f"({', '.join(INPUT_CODECS)}), each with {ZSTD} behind it if wanted, or bound:R, xbound:R or xsvd:R "
            f"with R as 0.1, got {name!r}"
        )


def make_codec(name: str, layers: Sequence[PagedLayer]) -> Codec:
    """The codec of a name for the pages of an engine's layers.

    Raises:
        ValueError: there is none, or no layer has the cache that it is for.
    """
    check_codec(name)
    base, compresses = name.removesuffix(ZSTD), name.endswith(ZSTD)
    foreign = without_format(layers)
    if len(foreign) == len(layers) and base != EXACT:
        raise ValueError(
            f"codec {name!r} needs kv_cache_dtype='int8_custom'; other caches can be stored with exact, or as inputs "
            f"of layers ({', '.join(INPUT_CODECS)})"
        )
    if base.startswith(BOUND):
        return Bounded(layers, parse_bound(base))
    codec: PageCodec = Exact(layers) if base == EXACT else Requantized(layers, FORMATS[base])
    if not compresses:
        return codec
    itemsize = math.gcd(*(layer.pages.itemsize for layer in foreign))
    return Compressed(codec, itemsize) if len(foreign) == len(layers) else CompressedPages(codec, itemsize)


def make_input_codec(
    name: str, layers: Sequence[InputLayer], namespace: Path, metrics: Sequence[torch.Tensor] = ()
) -> Codec:
    """The codec of a name for the inputs of an engine's layers.

    Args:
        namespace: the folder of what is saved, which keeps what the codec must know beforehand.
        metrics: of each layer `[hidden_size, hidden_size]` with x M x the size of the K and V of an input x, where the
            codec `needs_metrics` and blocks are saved.
    """
    base = name.removesuffix(ZSTD)
    plain, across = (
        KeptInFolder(namespace, Factors, partial(Factors.measure, across_layers=across)) for across in (False, True)
    )
    if base == EXACT_INPUTS:
        codec: Codec = ExactInputs(layers)
    elif base in INPUT_BITS:
        codec = QuantizedInputs(layers, plain, INPUT_BITS[base], first_bits=INPUT_BITS[base])
    elif base in CROSS_LAYER_BITS:
        codec = QuantizedInputs(layers, across, CROSS_LAYER_BITS[base], first_bits=FIRST_BITS)
    elif base.startswith(INPUT_BOUND):
        codec = BoundedInputs(layers, across, parse_bound(base))
    else:
        basis = KeptInFolder(namespace, Basis, lambda inputs: Basis.of_metrics(metrics))
        codec = LatentInputs(layers, basis, parse_bound(base))
    if not name.endswith(ZSTD):
        return codec
    return Compressed(codec, layers[0].dtype.itemsize if base == EXACT_INPUTS else 1)

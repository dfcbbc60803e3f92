"""The codecs by name."""

from collections.abc import Sequence

from vllm_int8kv.cache.formats import FORMATS
from vllm_int8kv.store.bounded import Bounded, parse_bound
from vllm_int8kv.store.codecs import Codec, Compressed, Exact, Requantized
from vllm_int8kv.store.pages import PagedLayer

EXACT = "exact"
ZSTD = "+zstd"
"""What a codec's name ends with if its payload is compressed in the end."""


def check_codec(name: str) -> None:
    """Raise ValueError unless a codec is called so."""
    base = name.removesuffix(ZSTD)
    if base.startswith("bound:"):
        parse_bound(base)
        if name.endswith(ZSTD):
            raise ValueError(f"codec {name!r}: bound compresses already; leave {ZSTD} out")
    elif base not in ("exact", *FORMATS):
        raise ValueError(
            f"codec must be exact, a cache format ({', '.join(FORMATS)}) or bound:R with R as 0.1, each but the last "
            f"with {ZSTD} behind it if wanted, got {name!r}"
        )


def make_codec(name: str, layers: Sequence[PagedLayer]) -> Codec:
    """The codec of a name for the layers of an engine.

    Raises:
        ValueError: there is none, or no layer has the cache that it is for.
    """
    check_codec(name)
    base = name.removesuffix(ZSTD)
    if base == "exact":
        codec: Codec = Exact(layers)
    elif all(layer.cache_format is None for layer in layers):
        raise ValueError(f"codec {name!r} needs kv_cache_dtype='int8_custom'; other caches can be stored with exact")
    elif base.startswith("bound:"):
        codec = Bounded(layers, parse_bound(base))
    else:
        codec = Requantized(layers, FORMATS[base])
    return Compressed(codec) if name.endswith(ZSTD) else codec

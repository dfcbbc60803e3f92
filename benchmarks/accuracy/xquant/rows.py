"""The rows of the table of X: what is compared, by section."""

from dataclasses import dataclass, replace

from benchmarks.accuracy.schemes import SCHEMES
from benchmarks.accuracy.xquant.inputs import (
    EQUALIZED,
    EQUALIZED_ROTATED,
    PLAIN,
    ROTATED,
    Fixed,
    InputCodec,
    Prediction,
    Stepped,
    Transform,
)
from benchmarks.accuracy.xquant.kv import BoundedCodec, SchemeCodec
from benchmarks.accuracy.xquant.latents import CrossLayerLatentCodec, LatentCodec, SteppedLatentCodec
from benchmarks.accuracy.xquant.remat import Codec

BITS = (8, 6, 5, 4, 3, 2)
EVERY_CHOICE = (8,)
"""Bits at which transforms and groups are compared one by one."""
PAPER_GROUP = 128
GROUP = 192
"""Of what is rotated in blocks of 64: a third of the channels of SmolLM2."""
EXPONENTS = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.5), (0.75, 0.25), (0.75, 0.75))
STEPS = (0.025, 0.05, 0.1)
LATENT_STEPS = (0.01, 0.0125, 0.025, 0.05, 0.1)
CL_BITS = (8, 4, 3, 2)
PAPER_FIRST = (Fixed(4, PAPER_GROUP),) * 3
SAFE_FIRST = (Fixed(8, GROUP),) * 3
REFERENCES = ("k8v8", "k8v4", "k6v6", "k6v4", "k4v4", "k4v2", "k2v2", "kivi4", "kivi2")


@dataclass(frozen=True)
class Row:
    """One codec of the table."""

    name: str
    meaning: str
    codec: Codec


def references() -> list[Row]:
    """Formats of K and V with about as many bytes."""
    schemes = {scheme.name: scheme for scheme in SCHEMES}
    rows = [Row(name, schemes[name].meaning, SchemeCodec(schemes[name])) for name in REFERENCES]
    for step in (0.025, 0.05, 0.1):
        rows += [
            Row(f"bound:{step} per block", f"K and V, step {step} of a block's", BoundedCodec(Stepped(step, block=64))),
            Row(f"bound:{step} per token", f"K and V, step {step} of a token's", BoundedCodec(Stepped(step))),
        ]
    return rows


def fixed(bits: int) -> list[Row]:
    """X with a number of bits, from the paper's way to the best one found."""
    rows = [
        Row(f"x{bits} paper", f"{bits} bits, groups of 128, as the paper", InputCodec(Fixed(bits, PAPER_GROUP))),
        Row(f"x{bits} token", f"{bits} bits, per token", InputCodec(Fixed(bits))),
        Row(f"x{bits} g64", f"{bits} bits, groups of 64", InputCodec(Fixed(bits, 64))),
        Row(f"x{bits} g64 rotated", f"{bits} bits, rotated, groups of 64", InputCodec(Fixed(bits, 64), ROTATED)),
        Row(f"x{bits} g64 equalized", f"{bits} bits, equalized, groups of 64", InputCodec(Fixed(bits, 64), EQUALIZED)),
        Row(
            f"x{bits} best g64",
            f"{bits} bits, equalized, rotated, groups of 64",
            InputCodec(Fixed(bits, 64), EQUALIZED_ROTATED),
        ),
        Row(
            f"x{bits} best g64 symmetric",
            f"{bits} bits, equalized, rotated, groups of 64, no midpoints",
            InputCodec(Fixed(bits, 64, midpoint=False), EQUALIZED_ROTATED),
        ),
        Row(
            f"x{bits} best",
            f"{bits} bits, equalized, rotated, groups of 192",
            InputCodec(Fixed(bits, GROUP), EQUALIZED_ROTATED),
        ),
        Row(
            f"x{bits} best token",
            f"{bits} bits, equalized, rotated, per token",
            InputCodec(Fixed(bits), EQUALIZED_ROTATED),
        ),
    ]
    kept = ("paper", "g64 rotated", "best g64", "best")
    return [row for row in rows if bits in EVERY_CHOICE or row.name.removeprefix(f"x{bits} ") in kept]


def transforms() -> list[Row]:
    """The exponents of the equalizer at 8 bits, rotated, with one scale per token."""
    rows = [
        Row(
            f"x8 a={a} b={b}",
            f"a = {a:g}, b = {b:g}",
            InputCodec(Fixed(8), replace(EQUALIZED_ROTATED, norm_exponent=a, rms_exponent=b)),
        )
        for a, b in EXPONENTS
    ]
    powers = InputCodec(Fixed(8), replace(EQUALIZED_ROTATED, powers_of_two=True))
    return [*rows, Row("x8 powers of two", "a = b = 0.5, powers of two", powers)]


def stepped() -> list[Row]:
    """X as multiples of a step, which only entropy coding makes small."""
    rows = []
    for step in STEPS:
        rows.append(Row(f"xe:{step}", f"step {step} of a token's", InputCodec(Stepped(step), EQUALIZED)))
    step = STEPS[0]
    block = InputCodec(Stepped(step, block=64), EQUALIZED)
    uniform = InputCodec(Stepped(step), Transform(norm_exponent=1, rms_exponent=0))
    plain = InputCodec(Stepped(step), PLAIN)
    rotated = InputCodec(Stepped(step), EQUALIZED_ROTATED)
    return [
        *rows,
        Row(f"xe:{step} per block", f"step {step} of a block's of 64 tokens", block),
        Row(f"xe:{step} rotated", f"step {step}, rotated", rotated),
        Row(f"xe:{step} a=1 b=0", f"step {step}, a = 1, b = 0", uniform),
        Row(f"xe:{step} plain", f"step {step}, not equalized", plain),
    ]


def cross_layer(bits: int) -> list[Row]:
    """XQuant-CL with a number of bits."""

    def codec(first: tuple[Fixed, ...], group: int, transform: Transform, prediction: Prediction) -> InputCodec:
        return InputCodec(Fixed(bits, group), transform, prediction, first)

    previous, factors = Prediction.previous, Prediction.factors
    return [
        Row(
            f"xcl{bits} paper",
            f"{bits} bits, groups of 128, first 3 layers at 4, as the paper",
            codec(PAPER_FIRST, 128, PLAIN, previous),
        ),
        Row(f"xcl{bits} first8", f"{bits} bits, groups of 128", codec(SAFE_FIRST, 128, PLAIN, previous)),
        Row(
            f"xcl{bits} rotated",
            f"{bits} bits, rotated, groups of 192",
            codec(SAFE_FIRST, GROUP, ROTATED, previous),
        ),
        Row(
            f"xcl{bits} equalized",
            f"{bits} bits, equalized, rotated, groups of 192",
            codec(SAFE_FIRST, GROUP, EQUALIZED_ROTATED, previous),
        ),
        Row(
            f"xcl{bits} best",
            f"{bits} bits, equalized, rotated, groups of 192, factors",
            codec(SAFE_FIRST, GROUP, EQUALIZED_ROTATED, factors),
        ),
    ]


def cross_layer_stepped() -> list[Row]:
    """Differences between layers as multiples of a step."""
    factors = Prediction.factors
    rows = [
        Row(f"xcle:{step}", f"step {step} of a token's", InputCodec(Stepped(step), EQUALIZED, factors))
        for step in (*STEPS, 0.2)
    ]
    step = STEPS[1]
    sink = InputCodec(Stepped(step, first_token=1 / 8), EQUALIZED, factors)
    previous = InputCodec(Stepped(step), EQUALIZED, Prediction.previous)
    return [
        *rows,
        Row(f"xcle:{step} previous", f"step {step}, no factors", previous),
        Row(f"xcle:{step} sink", f"step {step}, an eighth of it for the first token", sink),
    ]


def stepped_latents() -> list[Row]:
    """What K and V see of X, as multiples of a step."""
    rows = [Row(f"xsvd:{step}", f"step {step} of a token's", SteppedLatentCodec(step)) for step in LATENT_STEPS]
    step = LATENT_STEPS[1]
    alone, plain = SteppedLatentCodec(step, Prediction.none), SteppedLatentCodec(step, norms=False)
    full = SteppedLatentCodec(step, queries=True)
    return [
        *rows,
        Row(f"xsvd:{step} alone", f"step {step}, every layer alone", alone),
        Row(f"xsvd:{step} plain", f"step {step}, W_k and W_v as they are", plain),
        Row(f"xsvd:{step} full rank", f"step {step}, of [W_q, W_k, W_v], as wide as X", full),
    ]


SECTIONS: dict[str, list[Row]] = {
    "K and V": references(),
    "X": [row for bits in BITS for row in fixed(bits)],
    "X in 8 bits per token, rotated: exponents a and b of the equalizer": transforms(),
    "X, entropy-coded, equalized": stepped(),
    "X across layers, the first three at 8 bits": [row for bits in CL_BITS for row in cross_layer(bits)],
    "X across layers, entropy-coded, equalized, factors": cross_layer_stepped(),
    "X in singular vectors, across layers, entropy-coded": stepped_latents(),
    "X in singular vectors, for grouped queries": [
        *(Row(f"svd{bits}", f"{bits} bits", LatentCodec(bits)) for bits in (8, 4, 3, 2)),
        *(
            Row(f"svdcl{bits}", f"{bits} bits, across layers, first 3 at 4 bits", CrossLayerLatentCodec(bits))
            for bits in (8, 4, 3, 2)
        ),
        *(
            Row(
                f"svdcl{bits} first8",
                f"{bits} bits, across layers, first 3 at 8 bits",
                CrossLayerLatentCodec(bits, first_bits=8),
            )
            for bits in (8, 4, 3, 2)
        ),
    ],
}
"""How the table is cut."""
ROWS: dict[str, Row] = {row.name: row for rows in SECTIONS.values() for row in rows}
BEHIND_K8V8 = (
    "x8 best",
    "x8 best token",
    "x8 best g64 symmetric",
    "xe:0.025",
    "xcl8 best",
    "xcle:0.05",
    "xcle:0.05 sink",
    *(f"xsvd:{step}" for step in LATENT_STEPS),
)
"""Also measured with a K8V8 cache behind them, as the store restores."""

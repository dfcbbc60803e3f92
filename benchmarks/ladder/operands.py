"""One shape of the quantization ladder: operands, the answers expected from every variant, and their times."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch

from benchmarks import timing
from benchmarks.timing import Budget, CallOnce, Timing
from vllm_int8kv.cache import ladder, reference

PART_ELEMENTS = 1 << 24
"""Elements per part where the reference or the metrics work on a matrix piece by piece."""

OPERATIONS = ("quantize", "quantize_with_scales", "dequantize")
"""Scales given, as the paper times it; scales found inside the timed region; the way back."""

COPY = "copy"
"""A plain copy of the matrix, the bound: it moves what it reads once and what it writes once."""


class CheckError(Exception):
    """A variant does not give the reference's bits; its time means nothing."""


@dataclass(frozen=True)
class LadderShape:
    """A matrix of the paper."""

    num_tokens: int
    num_channels: int

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.num_channels}"

    @property
    def num_elements(self) -> int:
        return self.num_tokens * self.num_channels


SHAPES = [
    LadderShape(*shape)
    for shape in (
        (1024, 64),
        (2048, 128),
        (16384, 256),
        (65536, 256),
        (131072, 256),
        (262144, 128),
        (131072, 1024),
        (131072, 2048),
        (131072, 4096),
        (131072, 8192),
    )
]
"""The ten of arXiv 2601.04719, by size."""


def bytes_moved(shape: LadderShape, dtype: torch.dtype) -> int:
    """Bytes that any implementation must move: every element once, every code once, every scale once."""
    return shape.num_elements * (dtype.itemsize + 1) + 4 * shape.num_channels


def require_memory(shape: LadderShape, bytes_per_element: int, device: str) -> None:
    """Raise MemoryError if so much, and what the reference or the metrics need for a part, is not free."""
    need = shape.num_elements * bytes_per_element + 40 * PART_ELEMENTS
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if need > 0.9 * free:
        raise MemoryError(f"{shape} needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


class Operands:
    """U(-1, 1) as in the paper, in as many copies as it takes to find each of them cold."""

    def __init__(self, shape: LadderShape, dtype: torch.dtype, device: str, seed: int) -> None:
        self.shape, self.dtype, self.device, self.seed = shape, dtype, device, seed
        num_copies = timing.cold_copies(shape.num_elements * dtype.itemsize)
        # Matrix, codes and result of every copy, and the expected codes.
        require_memory(shape, num_copies * (2 * dtype.itemsize + 1) + 1, device)
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.empty(shape.num_tokens, shape.num_channels, dtype=dtype, device=device)
        self.x = [x.uniform_(-1, 1, generator=generator), *(x.clone() for _ in range(num_copies - 1))]
        self.codes = [torch.empty(x.shape, dtype=torch.int8, device=device) for _ in self.x]
        self.out = [torch.empty_like(x).fill_(torch.nan) for _ in self.x]  # filled, so that its pages are mapped
        self.scales = self._reference_scales()
        self._turn = itertools.count()

    def parts(self) -> Iterator[slice]:
        """Rows that are looked at together."""
        step = max(1, PART_ELEMENTS // self.shape.num_channels)
        for begin in range(0, self.shape.num_tokens, step):
            yield slice(begin, begin + step)

    def _reference_scales(self) -> torch.Tensor:
        parts = [reference.quantize_per_channel(self.x[0][rows])[1] for rows in self.parts()]
        return torch.stack(parts).amax(dim=0)

    def check(self, variants: list[str]) -> None:
        """Compare codes, scales and the way back of every variant with the reference, bit for bit.

        Raises:
            CheckError: one differs.
        """
        x, codes, out = self.x[0], self.codes[0], self.out[0]
        want = torch.empty_like(codes)
        for rows in self.parts():
            want[rows] = reference.quantize_per_channel(x[rows], scales=self.scales)[0]
        for variant in variants:
            _, found = ladder.quantize_per_channel(x, variant=variant, out=codes.fill_(-128))
            if not (torch.equal(found, self.scales) and torch.equal(codes, want)):
                raise CheckError(f"{variant} of {self.shape} differs from the reference")
            if variant == "fused":
                continue
            ladder.quantize_per_channel(x, scales=self.scales, variant=variant, out=codes.fill_(-128))
            if not torch.equal(codes, want):
                raise CheckError(f"{variant} of {self.shape} with given scales differs from the reference")
            ladder.dequantize_per_channel(codes, found, variant=variant, out=out.fill_(torch.nan))
            for rows in self.parts():
                back = reference.dequantize_per_channel(want[rows], self.scales, dtype=self.dtype)
                if not torch.equal(out[rows], back):
                    raise CheckError(f"{variant} of {self.shape} dequantizes otherwise than the reference")
        for other in self.codes[1:]:
            other.copy_(want)

    def calls(self, variant: str) -> dict[str, CallOnce]:
        """The operations of a variant."""

        def quantize(_: int) -> None:
            x, codes, _ = self._next_copy()
            ladder.quantize_per_channel(x, scales=self.scales, variant=variant, out=codes)

        def quantize_with_scales(_: int) -> None:
            x, codes, _ = self._next_copy()
            ladder.quantize_per_channel(x, variant=variant, out=codes)

        def dequantize(_: int) -> None:
            _, codes, out = self._next_copy()
            ladder.dequantize_per_channel(codes, self.scales, variant=variant, out=out)

        if variant == "fused":
            return {"quantize_with_scales": quantize_with_scales}
        return dict(zip(OPERATIONS, (quantize, quantize_with_scales, dequantize), strict=True))

    def copy_call(self) -> CallOnce:
        def copy(_: int) -> None:
            x, _, out = self._next_copy()
            out.copy_(x)

        return copy

    def _next_copy(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Matrix, codes and result that no call has touched for as many calls as there are copies."""
        copy = next(self._turn) % len(self.x)
        return self.x[copy], self.codes[copy], self.out[copy]


Key = tuple[str, str]
"""(variant, operation); (COPY, COPY) is the copy."""


def measure(operands: Operands, variants: list[str], budget: Budget, clock: timing.Clock) -> dict[Key, Timing]:
    """Times of all operations of all variants and of the copy, with the current number of threads.

    Everything takes turns, except the paper's CPU loop: one of its calls takes longer than all others together, so
    it comes after them and is timed less often.
    """
    fast = [variant for variant in variants if variant != "column_strided"]
    calls = {(variant, name): call for variant in fast for name, call in operands.calls(variant).items()}
    timings = _take(calls | {(COPY, COPY): operands.copy_call()}, budget, clock)
    if "column_strided" in variants:
        slow = {("column_strided", name): call for name, call in operands.calls("column_strided").items()}
        is_huge = operands.shape.num_elements > 1 << 27  # 5 seconds a call
        few = Budget(seconds=budget.seconds, min_samples=1 if is_huge else 3, warmup=0 if is_huge else 1)
        timings |= _take(slow, few, clock)
    return timings


def _take(calls: dict[Key, Callable[[int], object]], budget: Budget, clock: timing.Clock) -> dict[Key, Timing]:
    """`timing.interleave` with pairs as names."""
    named = timing.interleave({"/".join(key): call for key, call in calls.items()}, budget, clock)
    return {key: named["/".join(key)] for key in calls}

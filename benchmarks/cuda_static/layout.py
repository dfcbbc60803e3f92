"""What the headers of the kernels know and their machine code does not say: shared memory, and conflicts of its banks.

`layout.cpp` prints it, compiled for the host.
"""

import math
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_int8kv.evaluation.record import ROOT

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = [
    *["-std=c++20", "-O0", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"],
    *["-include", str(ROOT / "tests" / "builds" / "cuda_emulation.h")],
]
BANKS = 32
BANK_BYTES = 4


@dataclass(frozen=True)
class Layout:
    """What `layout.cpp` prints."""

    attention_bytes: dict[tuple[str, int, int], int]
    """dynamic shared memory by format, spans of 64 dims and tiles of 8 query rows"""
    ways: dict[str, dict[str, int]]
    """by kernel, how many times its accesses to shared memory take as long as without conflicts at most, by what is
    accessed: `k_store` and the like"""
    merges: tuple[int, ...]
    """how many states are merged at once, one after another, where an item has 66 splits"""


def ways(addresses: Sequence[int], width: int) -> int:
    """How many times a warp's access to shared memory takes as long as one without conflicts.

    Args:
        addresses: byte of each of the 32 lanes; negative where a lane takes no part.
        width: bytes per lane. With more than 4 as many lanes at a time as can take all banks.
    """
    lanes = BANKS * BANK_BYTES // max(width, BANK_BYTES)
    most = 0
    for first in range(0, len(addresses), lanes):
        taken = [address for address in addresses[first : first + lanes] if address >= 0]
        words = {byte // BANK_BYTES for address in taken for byte in range(address, address + width, BANK_BYTES)}
        most = max(most, *Counter(word % BANKS for word in words).values(), 0)
    return most


def parse(printed: str) -> Layout:
    attention_bytes, accesses, merges = {}, {}, ()
    for line in printed.splitlines():
        kind, name, *rest = line.split()
        if kind == "attention":
            spans, row_tiles, size = map(int, rest)
            attention_bytes[name, spans, row_tiles] = size
        elif kind == "merge":
            splits, group = int(name), int(rest[0])
            merges = (splits,) if splits <= group else (group, math.ceil(splits / group))
        else:
            plane, access, width, *addresses = rest
            known, what = accesses.setdefault(name, {}), f"{plane.lower()}_{access}"
            known[what] = max(known.get(what, 0), ways([int(address) for address in addresses], int(width)))
    return Layout(attention_bytes, accesses, merges)


@cache
def layout() -> Layout:
    """Compiled and run."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "layout")
        subprocess.run(["c++", *FLAGS, "-o", program, SOURCE], check=True)
        return parse(subprocess.run([program], check=True, capture_output=True, text=True).stdout)

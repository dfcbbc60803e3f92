"""The hot kernels, and what is counted of each.

Every kernel: what ptxas reports, the blocks that a multiprocessor holds, all instructions, and accesses to local memory
(`local_accesses`), where registers go that do not suffice. Beside that, along paths (`paths.py`):

    attention   once around the loop over tiles of keys, with all multiplications, copies and loads and no masks: a tile
                that all rows see, while the next one is copied (`loop_...`); bytes of a tile and the bound that issuing
                these instructions sets, in bytes per clock; and from the entry to the first copy of codes
                (`before_copy_...`), also where a step has one sequence (`..._of_one`). Of the merge of splits: the most
                loads of their outputs on the way once around its loop, and how often such loads are waited for where an
                item has 66 splits
    write       a token and head, K and V, in a full slot group of a prompt, equalized and rotated
    gather      a token and head, K and V, rotated back

Of write and gather also how many times their accesses to shared memory take as long as without conflicts of banks
(`..._ways`). Rows of fewer bits than eight are not counted: how many bits is found by a jump through a table.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.cuda_static.layout import layout
from benchmarks.cuda_static.occupancy import issue_bound, resident_blocks
from benchmarks.cuda_static.paths import Work, around, to_first
from benchmarks.cuda_static.sass import Kernel, Loop
from benchmarks.cuda_static.static_record import Figures
from vllm_int8kv.cache.formats import FORMATS

TILE_SLOTS = 64
MULTIPLY = "[HI]MMA"
WIDE_LOAD = r"LDG\S*\.128"
COPIES = {"75": WIDE_LOAD}
"""How codes come to shared memory; SM75 has no asynchronous copies."""
ASYNC_COPY = "LDGSTS"
LOOP_OPCODES = {"hmma": "HMMA", "imma": "IMMA", "prmt": "PRMT", "hadd2": "HADD2", "lds": "LDS", "bar": "BAR"}
Count = Callable[[Kernel, str], Figures]
"""The figures of a kind of kernel; the second argument is the architecture."""


@dataclass(frozen=True)
class HotKernel:
    """A kernel to be recorded."""

    name: str
    function: str
    """a pattern of its name as `.ci/cuda_compile.py` prints it"""
    count: Count
    threads: int = 128
    dynamic_shared: Callable[[], int] = lambda: 0


class NoLoopError(ValueError):
    """A kernel has no loop of the kind."""


def innermost_loop(kernel: Kernel, opcode: str, without: str | None = None) -> Loop:
    """The smallest loop with an opcode, and without another."""
    found = [
        loop
        for loop in kernel.loops
        if kernel.count(opcode, loop.body) and not (without and kernel.count(without, loop.body))
    ]
    if not found:
        raise NoLoopError(f"the kernel has no loop with {opcode}" + (f" and without {without}" if without else ""))
    return min(found, key=lambda loop: (len(loop.body), loop.header))


def attention(cache_format: str, head_size: int) -> Count:
    """On tensor cores."""
    tile_bytes = TILE_SLOTS * FORMATS[cache_format].content_bytes(head_size)

    def count(kernel: Kernel, arch: str) -> Figures:
        copy = COPIES.get(arch, ASYNC_COPY)
        loop = around(kernel, innermost_loop(kernel, MULTIPLY), Work(most=(MULTIPLY, copy, r"LDG\.")))
        start, of_one = to_first(kernel, copy), to_first(kernel, copy, passes_loops=True)
        return {
            "loop_instructions": len(loop.instructions),
            **{f"loop_{name}": loop.count(opcode) for name, opcode in LOOP_OPCODES.items()},
            "loop_copies": loop.count(copy),
            "loop_calls": loop.calls,
            "narrow_copies": kernel.count(rf"{ASYNC_COPY}(?!\S*\.128)"),
            "tile_bytes": tile_bytes,
            "issue_bound_bytes_per_clock": round(issue_bound(tile_bytes, len(loop.instructions)), 1),
            "before_copy_instructions": len(start.instructions),
            "before_copy_divisions": start.divisions,
            "before_copy_barriers": start.count("BAR"),
            "before_copy_calls": start.calls,
            "before_copy_instructions_of_one": len(of_one.instructions),
            "before_copy_barriers_of_one": of_one.count("BAR"),
            **merge(kernel),
        }

    return count


def merge(kernel: Kernel) -> Figures:
    """Of the splits of an item."""
    loop = around(kernel, innermost_loop(kernel, WIDE_LOAD, without=MULTIPLY), Work(most=(WIDE_LOAD,)))
    loads = loop.count(WIDE_LOAD)
    return {
        "merge_loads_in_flight": loads,
        "merge_rounds_of_66": sum(math.ceil(merged / loads) for merged in layout().merges),
    }


def shared_accesses(kernel: str) -> Figures:
    """Conflicts of banks, by the name that `layout.cpp` has for a kernel."""
    return {f"{access}_ways": ways for access, ways in layout().ways[kernel].items()}


def rows(name: str, at_least: tuple[tuple[str, int], ...]) -> Count:
    """Instructions per row, a token and head with K and V, of the loop that shuffles them.

    Args:
        name: of the kernel in `layout.cpp`.
        at_least: what is done with the rows that a warp has in each round.
    """

    def count(kernel: Kernel, arch: str) -> Figures:
        path = around(kernel, innermost_loop(kernel, "SHFL"), Work(at_least=at_least))
        counted = {"row_instructions": len(path.instructions) / WARP_ROWS, "round_divisions": path.divisions}
        return counted | shared_accesses(name)

    return count


def nothing(kernel: Kernel, arch: str) -> Figures:
    """Of kernels of which only what every kernel has is of interest."""
    return {}


def decode(cache_format: str, spans: int, row_tiles: int, is_simple: bool) -> HotKernel:
    """A tensor-core kernel for heads of `spans` times 64 dims."""
    arguments = f"{cache_format.upper()}, {spans}, {row_tiles}, {str(is_simple).lower()}"
    return HotKernel(
        f"decode {cache_format}, {8 * row_tiles} rows, head size {64 * spans}",
        f"paged_attention_decode_kernel<{arguments}>",
        attention(cache_format, 64 * spans),
        dynamic_shared=lambda: layout().attention_bytes[cache_format, spans, row_tiles],
    )


BF16_ROWS = "RowShape<16, 1>, bf16"
"""Of 128 dims, 8 of which a lane has."""
WARP_ROWS = 2
ROTATION, LARGEST = 32, 4
"""Shuffles of such rows: four stages of the rotation, and to the largest magnitude."""
WRITTEN_ROWS = (
    ("SHFL", ROTATION + 2 * LARGEST),
    (r"STS\.64", 2),
    (r"LDG\.E\S*\.128", 4),  # the rows of the next head, and the equalizer
    (r"STG\.E\S*\.U16", 2),  # scales
    (r"STG\.E\S*\.128", 1),
)
GATHERED_ROWS = (("SHFL", ROTATION), (r"STS\.64", 2), (r"STG\.E\S*\.128", 2))

HOT_KERNELS = (
    decode("k8v8", 2, 1, True),
    decode("k8v8", 2, 2, True),
    decode("k8v8", 2, 4, False),
    decode("k8v8", 1, 1, True),
    decode("k6v4", 2, 1, True),
    decode("k6v4", 2, 2, False),
    decode("k6v4", 1, 1, True),
    HotKernel("decode k8v8 without tensor cores", "paged_attention_plain_kernel<K8V8>", nothing),
    HotKernel(
        "write k8v8, head size 128",
        f"reshape_and_cache_int8_kernel<{BF16_ROWS}>",
        rows("write_k8v8", WRITTEN_ROWS),
        threads=256,
    ),
    HotKernel(
        "write of fewer bits, head size 128",
        "reshape_and_cache_low_bit_kernel<2>",
        lambda kernel, arch: shared_accesses("write_k6v4"),
        threads=512,
    ),
    HotKernel(
        "gather k8v8, head size 128",
        f"gather_cache_int8_kernel<{BF16_ROWS}>",
        rows("gather_k8v8", GATHERED_ROWS),
        threads=256,
    ),
    HotKernel("gather of fewer bits, head size 128", "gather_cache_low_bit_kernel<2>", nothing, threads=512),
)


def matching(names: list[str], hot: HotKernel) -> str:
    """The name of the one compiled kernel that it is. Raises LookupError if there is none or several."""
    found = [name for name in names if re.fullmatch(hot.function, name)]
    if len(found) != 1:
        template = hot.function.partition("<")[0]
        text = ", ".join(sorted(found or [name for name in names if name.startswith(template)])) or "none of its name"
        raise LookupError(f"{hot.name}: {len(found)} compiled kernels are {hot.function}; there are {text}")
    return found[0]


def figures(hot: HotKernel, kernel: Kernel, resources: dict, arch: str) -> Figures:
    """Everything that is recorded; `resources` is what `.ci/cuda_compile.py` leaves of the kernel."""
    dynamic = hot.dynamic_shared()
    shared = resources["static_shared"] + dynamic
    return {
        "registers": resources["registers"],
        "stack": resources["stack"],
        "spills": resources["spills"],
        "static_shared": resources["static_shared"],
        "dynamic_shared": dynamic,
        "resident_blocks": resident_blocks(arch, hot.threads, resources["registers"], shared),
        "instructions": len(kernel.instructions),
        "local_accesses": sum(x.name in ("LDL", "STL") for x in kernel.instructions),
        **hot.count(kernel, arch),
    }

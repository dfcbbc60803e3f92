"""One way through the control flow of a kernel: the shortest one on which certain work is done.

What a warp executes depends on its data, so instructions are counted along a path that is chosen by what is done on it,
not by where it lies. Loops on the way are gone through once, or passed by where the code allows it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cuda_static.sass import Instruction, Kernel, Loop


@dataclass(frozen=True)
class Work:
    """What a path does; opcodes are patterns of their beginning.

    Of all paths with `at_least` so many of some opcodes it is one with the most of the first opcode of `most`, of
    these one with the most of the second, and so on, of those one that calls the fewest subroutines, as they are for
    rare operands, and of those the shortest.
    """

    most: tuple[str, ...] = ()
    at_least: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Path:
    """The instructions of a way through a kernel, in their order."""

    instructions: tuple[Instruction, ...]

    def count(self, opcode: str) -> int:
        return _count(opcode, self.instructions)

    @property
    def calls(self) -> int:
        """Calls of subroutines."""
        return _calls(self.instructions)

    @property
    def divisions(self) -> int:
        """Divisions of integers. Each takes the reciprocal of its divisor once, from the integer rounded up; divisions
        by the same divisor share it, and one that is a subroutine counts as a call."""
        return self.count(r"I2F\S*\.RP")


class NoPathError(ValueError):
    """No path does the work."""


def around(kernel: Kernel, loop: Loop, work: Work) -> Path:
    """Once around a loop."""
    code = {block: kernel.blocks[block].instructions for block in loop.body}
    ends = {block for block in loop.body if loop.header in kernel.blocks[block].successors}
    weights = {block: tuple(_count(opcode, code[block]) for opcode in work.most) for block in code}
    return _best(kernel, loop.header, ends, code, weights, work.at_least)


def to_first(kernel: Kernel, opcode: str, *, passes_loops: bool = False) -> Path:
    """From the entry to the first instruction with an opcode, which is left out: what a thread with work does.

    No outermost loop is passed by, unless it `passes_loops`, as a kernel does that has one sequence and nothing to sum
    up. Of these paths it is one with the fewest barriers, since more are for batches of which a block cannot hold all
    sequences, and of those one with the most loads from global memory, since a thread without a sequence or a tile has
    none.
    """
    code, ends = {}, set()
    for block in kernel.order:
        code[block] = kernel.blocks[block].instructions
        for i, instruction in enumerate(code[block]):
            if re.match(opcode, instruction.opcode):
                code[block] = code[block][:i]
                ends.add(block)
                break
    if not ends:
        raise NoPathError(f"the kernel has no {opcode}")
    headers = set() if passes_loops else {loop.header for loop in kernel.outermost_loops()}
    weights = {
        block: (int(block in headers), -_count("BAR", part), _count(r"LDG\.", part)) for block, part in code.items()
    }
    return _best(kernel, 0, ends, code, weights, ())


def _count(opcode: str, instructions: Iterable[Instruction]) -> int:
    return sum(bool(re.match(opcode, instruction.opcode)) for instruction in instructions)


def _calls(instructions: Iterable[Instruction]) -> int:
    return sum(instruction.name == "CALL" and not instruction.is_jump for instruction in instructions)


@dataclass(frozen=True)
class _Way:
    """The best way to the end of a block with the same work done."""

    value: tuple[int, ...]
    """how much of `most`, then the negative calls and the negative length"""
    before: "tuple[int, tuple[int, ...]] | None"
    """the block before it, and the work done up to there"""


def _best(
    kernel: Kernel,
    start: int,
    ends: set[int],
    code: dict[int, list[Instruction]],
    weights: dict[int, tuple[int, ...]],
    at_least: tuple[tuple[str, int], ...],
) -> Path:
    """The best path through the blocks of `code`; `weights` is what each adds to the value of a path."""
    done = {block: tuple(_count(opcode, code[block]) for opcode, _ in at_least) for block in code}
    enough = tuple(number for _, number in at_least)
    ways: dict[int, dict[tuple[int, ...], _Way]] = {block: {} for block in code}

    def reach(block: int, before: tuple[int, tuple[int, ...]] | None) -> None:
        value = ways[before[0]][before[1]].value if before else (0,) * (len(weights[block]) + 2)
        work = before[1] if before else (0,) * len(enough)
        work = tuple(min(a + b, most) for a, b, most in zip(work, done[block], enough, strict=True))
        added = (*weights[block], -_calls(code[block]), -len(code[block]))
        way = _Way(tuple(a + b for a, b in zip(value, added, strict=True)), before)
        if work not in ways[block] or way.value > ways[block][work].value:
            ways[block][work] = way

    reach(start, None)
    places = {block: place for place, block in enumerate(kernel.order)}
    for block in (block for block in kernel.order if block in code):
        following = [b for b in kernel.blocks[block].successors if b in code and not kernel.is_way_back(block, b)]
        if any(places[b] < places[block] for b in following):
            raise ValueError("the kernel has a loop with two entries, through which no path is defined")
        for work in ways[block]:
            for b in following if block not in ends or kernel.blocks[block].instructions == code[block] else []:
                reach(b, (block, work))
    found = [(ways[end][enough].value, end) for end in ends if enough in ways[end]]
    if not found:
        most = Counter()
        for end in ends:
            for work in ways[end]:
                most |= Counter(dict(zip((opcode for opcode, _ in at_least), work, strict=True)))
        raise NoPathError(f"no path does {dict(at_least)}; each by itself there are at most {dict(most)}")
    step: tuple[int, tuple[int, ...]] | None = (max(found)[1], enough)
    path: list[Instruction] = []
    while step:
        block, work = step
        path[:0] = code[block]
        step = ways[block][work].before
    return Path(tuple(path))

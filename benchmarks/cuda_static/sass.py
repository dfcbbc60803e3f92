"""The machine code of kernels: disassembly, control flow and loops.

cuobjdump takes the code of one architecture out of an object, nvdisasm prints it with a label wherever something jumps
to. Both are NVIDIA's and come from PyPI; they need no GPU.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

SECTION = re.compile(r"^\.text\.(\S+):$")
LABEL = re.compile(r"^(\.L_x_\d+):$")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)(?:\s+([^;]*?))?\s*;")
TARGET = re.compile(r"\.L_x_\d+")
CONDITION = re.compile(r"\b!?U?P[0-6]\b")
JUMPS = ("BRA", "BRX", "JMP", "JMX")
ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a warp."""

    address: int
    predicate: str
    """`P0` or `!P0` where only some lanes may execute it, else empty"""
    opcode: str
    """with its modifiers, as `LDG.E.128`"""
    operands: str

    @property
    def name(self) -> str:
        """The opcode alone, as `LDG`."""
        return self.opcode.partition(".")[0]

    @property
    def is_jump(self) -> bool:
        """Whether it goes on elsewhere. Warps here are not divergent: they never take `BRA.DIV`, and always `BRA.CONV`.
        A call of a label, not of a subroutine, does not come back: on SM80 to SM89 some loops are left so."""
        if self.name == "CALL":
            return bool(self._labels)
        return self.name in JUMPS and ".DIV" not in self.opcode

    @property
    def _labels(self) -> list[str]:
        return TARGET.findall(self.operands)

    @property
    def targets(self) -> list[str]:
        """The labels it may jump to."""
        if not self.is_jump:
            return []
        if not self._labels:
            raise ValueError(f"{self.opcode} {self.operands} at {self.address:#x} jumps to no label")
        return self._labels

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow. What is called returns, and a barrier lies before the place where
        its lanes meet."""
        if not self.is_jump and self.name not in ENDS:
            return True
        return bool(self.predicate or CONDITION.search(self.operands.partition("`")[0]))


def tool(name: str) -> Path:
    """The program that the distribution nvidia-cuda-NAME brings. Raises FileNotFoundError without it."""
    try:
        found = [path for path in files(f"nvidia-cuda-{name}") or [] if path.name == name]
    except PackageNotFoundError:
        found = []
    if not found:
        raise FileNotFoundError(f"{name} is missing: pip install nvidia-cuda-{name}, or make setup")
    return Path(str(found[0].locate()))


def disassemble(object_file: Path) -> str:
    """The listing of all kernels of an object that was compiled for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        command = [tool("cuobjdump"), "-xelf", "all", object_file.resolve()]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        (code,) = Path(folder).iterdir()
        return subprocess.run([tool("nvdisasm"), "-c", code], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Block:
    """Instructions that follow one another, with the blocks that may come next by their numbers."""

    instructions: list[Instruction]
    successors: list[int]


@dataclass(frozen=True)
class Loop:
    """Blocks that go round: from `header`, which every way in passes, back to it."""

    header: int
    body: frozenset[int]


class Kernel:
    """The control flow of one kernel. Block 0 is its entry; subroutines that it calls are not part of it."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.instructions = instructions
        places = {instruction.address: i for i, instruction in enumerate(instructions)}
        starts = {0, *(places[labels[label]] for x in instructions for label in x.targets)}
        starts |= {i + 1 for i, x in enumerate(instructions[:-1]) if x.targets or not x.falls_through}
        ordered = sorted(starts)
        numbers = {start: number for number, start in enumerate(ordered)}
        self.blocks: list[Block] = []
        for start, end in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
            last = instructions[end - 1]
            successors = [numbers[places[labels[label]]] for label in last.targets]
            if last.falls_through and end in numbers:
                successors.append(numbers[end])
            self.blocks.append(Block(instructions[start:end], list(dict.fromkeys(successors))))

    @cached_property
    def order(self) -> list[int]:
        """The blocks that the entry leads to, each before those that follow it but for the way back of loops."""
        done: list[int] = []
        seen = {0}
        stack = [(0, iter(self.blocks[0].successors))]
        while stack:
            block, left = stack[-1]
            following = next((b for b in left if b not in seen), None)
            if following is None:
                done.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.blocks[following].successors)))
        return done[::-1]

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """By block, the blocks that every way to it passes, itself included."""
        predecessors: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for following in self.blocks[block].successors:
                predecessors[following].append(block)
        found = {block: set(self.order) for block in self.order}
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = {block}.union(set.intersection(*(found[before] for before in predecessors[block])))
                if new != found[block]:
                    found[block], changed = new, True
        return found

    def is_way_back(self, block: int, following: int) -> bool:
        """Whether a step from a block closes a loop."""
        return following in self.dominators[block]

    @cached_property
    def loops(self) -> list[Loop]:
        """One for each header, the outermost first."""
        bodies: dict[int, set[int]] = {}
        for block in self.order:
            for header in self.blocks[block].successors:
                if self.is_way_back(block, header):
                    bodies.setdefault(header, {header}).update(self._without_passing(header, block))
        loops = [Loop(header, frozenset(body)) for header, body in bodies.items()]
        return sorted(loops, key=lambda loop: -len(loop.body))

    def _without_passing(self, header: int, end: int) -> set[int]:
        """The blocks from which `end` can be reached without passing `header`."""
        found, new = {end}, [end]
        while new:
            reached = new.pop()
            if reached == header:
                continue
            for block in self.order:
                if reached in self.blocks[block].successors and block not in found:
                    found.add(block)
                    new.append(block)
        return found

    def outermost_loops(self) -> list[Loop]:
        """Those within no other."""
        return [x for x in self.loops if not any(x.body < other.body for other in self.loops)]

    def count(self, opcode: str, blocks: frozenset[int] | None = None) -> int:
        """How many instructions, of these blocks or of all, have an opcode that begins like the pattern."""
        return sum(
            bool(re.match(opcode, instruction.opcode))
            for block in (self.order if blocks is None else blocks)
            for instruction in self.blocks[block].instructions
        )


def parse(listing: str) -> dict[str, Kernel]:
    """The kernels of a listing by their mangled names."""
    return {name: Kernel(instructions, labels) for name, instructions, labels in _functions(listing)}


def _functions(listing: str) -> Iterator[tuple[str, list[Instruction], dict[str, int]]]:
    name, instructions, labels, waiting = "", [], {}, []
    for line in [*listing.splitlines(), ".text.END:"]:
        if section := SECTION.match(line):
            if instructions:
                yield name, instructions, labels
            name, instructions, labels, waiting = section[1], [], {}, []
        elif label := LABEL.match(line):
            waiting.append(label[1])
        elif found := INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups(default="")
            instructions.append(Instruction(int(address, 16), predicate, opcode, operands))
            labels.update(dict.fromkeys(waiting, int(address, 16)))
            waiting.clear()

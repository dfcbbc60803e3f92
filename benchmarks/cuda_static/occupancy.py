"""How many thread blocks of a kernel a multiprocessor holds at once, and how fast it can be fed.

The limits are those of the table "Technical Specifications per Compute Capability" in NVIDIA's CUDA C++ Programming
Guide; the arithmetic is that of `cudaOccupancyMaxActiveBlocksPerMultiprocessor` and of NVIDIA's occupancy calculator.
"""

from dataclasses import dataclass

WARP = 32
SCHEDULERS = 4
"""Of a multiprocessor, from SM75 on. Each issues an instruction of one warp per clock, and has a quarter of the
registers and of the warps."""
REGISTERS = 65536
REGISTER_UNIT = 256
"""Registers of a warp are allocated in such units."""


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; sizes in bytes."""

    warps: int
    blocks: int
    shared: int
    reserved_shared: int = 1024
    """per block, for the system"""
    shared_unit: int = 128


LIMITS = {
    "75": Limits(warps=32, blocks=16, shared=64 << 10, reserved_shared=0, shared_unit=256),
    "80": Limits(warps=64, blocks=32, shared=164 << 10),
    "86": Limits(warps=48, blocks=16, shared=100 << 10),
    "89": Limits(warps=48, blocks=24, shared=100 << 10),
    "90": Limits(warps=64, blocks=32, shared=228 << 10),
    "100": Limits(warps=64, blocks=32, shared=228 << 10),
    "120": Limits(warps=48, blocks=24, shared=100 << 10),
}


def resident_blocks(arch: str, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks of that many threads, registers per thread and bytes of shared memory, static and dynamic.

    0 where a single block does not fit.
    """
    limits = LIMITS[arch]
    warps = _round_up(threads, WARP) // WARP
    warp_registers = _round_up(registers * WARP, REGISTER_UNIT)
    warps_by_registers = REGISTERS // SCHEDULERS // warp_registers * SCHEDULERS
    shared = _round_up(shared_bytes + limits.reserved_shared, limits.shared_unit)
    return min(
        limits.blocks,
        limits.warps // warps,
        warps_by_registers // _round_up(warps, SCHEDULERS),
        limits.shared // shared if shared else limits.blocks,
    )


def _round_up(x: int, unit: int) -> int:
    return (x + unit - 1) // unit * unit


def issue_bound(bytes_read: int, instructions: int) -> float:
    """Bytes per clock and multiprocessor that can be read at most if so many instructions of a warp go with so many
    bytes: what the schedulers allow when all of them issue in every clock."""
    return bytes_read * SCHEDULERS / instructions


@dataclass(frozen=True)
class Gpu:
    """A GPU of an architecture, with what its memory delivers at its boost clock."""

    name: str
    gb_per_s: float
    multiprocessors: int
    ghz: float
    source: str

    @property
    def memory_bound(self) -> float:
        """Bytes per clock and multiprocessor."""
        return self.gb_per_s / self.multiprocessors / self.ghz


GPUS = {
    "75": [Gpu("T4", 320, 40, 1.59, "NVIDIA T4 datasheet and Turing whitepaper")],
    "80": [Gpu("A100 80GB SXM", 2039, 108, 1.41, "NVIDIA A100 datasheet and whitepaper")],
    "86": [Gpu("A10", 600, 72, 1.695, "NVIDIA A10 datasheet")],
    "89": [
        Gpu("L4", 300, 58, 2.04, "NVIDIA L4 datasheet"),
        Gpu("RTX 4090", 1008, 128, 2.52, "NVIDIA Ada whitepaper"),
    ],
    "90": [
        Gpu("H100 SXM", 3350, 132, 1.98, "NVIDIA H100 datasheet; clock as nvidia-smi has it"),
        Gpu("H200 SXM", 4800, 132, 1.98, "NVIDIA H200 datasheet; clock as nvidia-smi has it"),
    ],
    "100": [Gpu("B200", 8000, 148, 1.965, "NVIDIA Blackwell datasheet; clock as nvidia-smi has it")],
    "120": [Gpu("RTX 5090", 1792, 170, 2.407, "NVIDIA RTX Blackwell whitepaper")],
}
"""The GPUs of the report, by architecture."""

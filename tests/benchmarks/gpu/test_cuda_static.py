"""What is counted in the machine code of the CUDA kernels, on an excerpt that was counted by hand.

`excerpt.sass` is a decode kernel shortened to what matters: a loop over sequences with a barrier, a division that is a
subroutine for large numbers, copies, a loop with multiplications and masks, and a jump through a table.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cuda_static import cuda_static, layout, sass, static_record
from benchmarks.cuda_static.kernels import (
    HOT_KERNELS,
    NoLoopError,
    attention,
    figures,
    innermost_loop,
    matching,
    merge,
)
from benchmarks.cuda_static.occupancy import GPUS, LIMITS, issue_bound, resident_blocks
from benchmarks.cuda_static.paths import NoPathError, Work, around, to_first
from benchmarks.report.cuda import tables
from vllm_int8kv.evaluation import record

EXCERPT = (Path(__file__).parent / "excerpt.sass").read_text()
TILE_BYTES = 64 * 260


@pytest.fixture(scope="module")
def kernel():
    return sass.parse(EXCERPT)["kernel"]


def addresses(path):
    return [instruction.address for instruction in path.instructions]


def test_listing_is_parsed(kernel):
    assert list(sass.parse(EXCERPT)) == ["kernel", "spills"]
    assert len(kernel.instructions) == 0x2D0 // 16
    copy = kernel.instructions[0x120 // 16]
    assert (copy.predicate, copy.name, copy.targets) == ("P4", "LDGSTS", [])
    table = kernel.instructions[0x200 // 16]
    assert table.targets == [".L_x_10", ".L_x_11"] and not table.falls_through
    assert kernel.instructions[0x170 // 16].falls_through, "`BRA P5` has a condition too"


def test_divergent_warps_and_subroutines_are_left_out(kernel):
    reached = {x.address for block in kernel.order for x in kernel.blocks[block].instructions}
    assert 0x270 in reached
    assert not {0x280, 0x290, 0x2A0, 0x2C0} & reached


def test_loops(kernel):
    starts = [kernel.blocks[loop.header].instructions[0].address for loop in kernel.loops]
    assert sorted(starts) == [0x30, 0x140, 0x210]
    assert kernel.outermost_loops() == kernel.loops
    assert kernel.blocks[innermost_loop(kernel, "HMMA").header].instructions[0].address == 0x140
    with pytest.raises(NoLoopError, match="no loop with HMMA and without LDS"):
        innermost_loop(kernel, "HMMA", without="LDS")


def test_hot_loop_has_all_copies_and_no_masks(kernel):
    loop = innermost_loop(kernel, "HMMA")
    path = around(kernel, loop, Work(most=("HMMA", "LDGSTS")))
    assert addresses(path) == [0x140, 0x150, 0x160, 0x170, 0x1C0, 0x1D0, 0x1E0, 0x1F0]
    assert path.count("FSEL") == 0
    masked = around(kernel, loop, Work(at_least=(("FSEL", 1),)))
    assert addresses(masked) == [0x140, 0x150, 0x160, 0x170, 0x180, 0x190, 0x1A0, 0x1B0, 0x1D0, 0x1F0]
    with pytest.raises(NoPathError, match=r"\{'FSEL': 3\}; each by itself there are at most \{'FSEL': 2\}"):
        around(kernel, loop, Work(at_least=(("FSEL", 3),)))


def test_way_to_the_first_copy_goes_through_loops_and_divides_without_a_call(kernel):
    path = to_first(kernel, "LDGSTS")
    assert addresses(path) == [0x0, 0x10, 0x20, *range(0x30, 0xB0, 0x10), 0xE0, 0xF0, 0x100, 0x110]
    assert (path.divisions, path.count("BAR"), path.calls) == (1, 1, 0)
    of_one = to_first(kernel, "LDGSTS", passes_loops=True)
    assert addresses(of_one) == [0x0, 0x10, 0x20, 0xA0, 0xE0, 0xF0, 0x100, 0x110]
    with pytest.raises(NoPathError, match="no LDSM"):
        to_first(kernel, "LDSM")


def test_figures_of_a_decode_kernel(kernel):
    found = attention("k8v8", 128)(kernel, "90")
    assert found["loop_instructions"] == 8 and found["loop_hmma"] == found["loop_prmt"] == found["loop_copies"] == 1
    assert found["tile_bytes"] == TILE_BYTES and found["issue_bound_bytes_per_clock"] == TILE_BYTES * 4 / 8
    assert (found["before_copy_instructions"], found["before_copy_divisions"]) == (15, 1)
    assert (found["before_copy_instructions_of_one"], found["before_copy_barriers_of_one"]) == (8, 0)
    assert found["narrow_copies"] == found["loop_calls"] == 0
    narrow = sass.parse(EXCERPT.replace("LTC128B.128 [R20]", "LTC128B.64 [R20]"))["kernel"]
    assert attention("k8v8", 128)(narrow, "90")["narrow_copies"] == 2


def test_accesses_to_local_memory_are_found():
    spilling = sass.parse(EXCERPT)["spills"]
    resources = {"registers": 40, "stack": 8, "spills": 8, "static_shared": 0}
    hot = replace(HOT_KERNELS[-1], count=lambda kernel, arch: {})
    found = figures(hot, spilling, resources, "90")
    assert found["local_accesses"] == 2
    assert static_record.forbidden(found) == ["spills is 8 and must be 0", "local_accesses is 2 and must be 0"]


def test_rounds_of_the_merge(kernel):
    """Two loads at a time, of 12 and then of 6 splits."""
    assert layout.layout().merges == (12, 6)
    assert merge(kernel) == {"merge_loads_in_flight": 2, "merge_rounds_of_66": 6 + 3}


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        ("90", 128, 124, 39352 + 1088, 4),  # registers: the 97 % of an SM that four blocks fill
        ("90", 128, 252, 93848 + 1088, 2),
        ("86", 128, 254, 93848 + 1088, 1),  # shared memory
        ("75", 128, 245, 93848 + 1088, 0),
        ("80", 1024, 32, 0, 2),  # warps
        ("86", 1024, 32, 0, 1),
        ("80", 32, 16, 0, 32),  # blocks
        ("75", 32, 16, 0, 16),
        ("80", 256, 64, 0, 4),
        ("80", 256, 65, 0, 3),  # 72 registers are allocated
        ("90", 128, 32, 227 << 10, 1),  # the most that a block may have
        ("90", 128, 32, (227 << 10) + 1, 0),
    ],
)
def test_resident_blocks(arch, threads, registers, shared, blocks):
    assert resident_blocks(arch, threads, registers, shared) == blocks


def test_bounds():
    assert issue_bound(16640, 1238) == pytest.approx(53.8, abs=0.05)
    assert LIMITS.keys() == GPUS.keys()
    h200 = next(gpu for gpu in GPUS["90"] if gpu.name.startswith("H200"))
    assert 16 < h200.memory_bound < 19


def test_conflicts_of_banks():
    assert layout.ways([4 * lane for lane in range(32)], 4) == 1
    assert layout.ways([0] * 32, 4) == 1, "one word for all"
    assert layout.ways([2 * lane for lane in range(32)], 2) == 1
    assert layout.ways([32 * lane for lane in range(32)], 2) == 8
    assert layout.ways([32 * lane if lane < 8 else -1 for lane in range(32)], 2) == 2
    assert layout.ways([128 * lane for lane in range(32)], 1) == 32
    assert layout.ways([8 * lane for lane in range(32)], 8) == 1, "half a warp at a time"
    assert layout.ways([16 * lane for lane in range(32)], 8) == 2
    assert layout.ways([16 * lane for lane in range(32)], 16) == 1
    assert layout.ways([-1] * 32, 4) == 0


def test_splits_are_merged_in_groups():
    assert layout.parse("merge 66 66").merges == (66,)
    assert layout.parse("merge 66 16").merges == (16, 5)


def test_layout_is_that_of_the_kernels():
    found = layout.layout()
    assert found.attention_bytes["k8v8", 2, 4] == 93848
    assert found.ways["write_k6v4"].keys() == {"k_store", "v_store"}
    for kernel in ("write_k8v8", "gather_k8v8"):
        assert found.ways[kernel] == {"k_store": 1, "v_store": 1, "k_load": 1, "v_load": 1}, "as GroupTile promises"


def line(name="merge", utc="2026-01-01T00:00:00+00:00", arch="90", nvcc="13.0.88", **counted):
    return static_record.StaticRecord(
        kernel=name,
        function=f"{name}_kernel",
        arch=arch,
        nvcc=nvcc,
        figures={"registers": 100, "local_accesses": 0} | counted,
        commit="0123456789ab",
        dirty=False,
        command="python -m benchmarks.cuda_static",
        utc=utc,
    )


def changes(found, nvcc="13.0.88"):
    return static_record.changes({"merge": line()}, {"merge": found}, nvcc)


def test_changes_above_two_percent_fail():
    assert changes({"registers": 102, "local_accesses": 0}) == []
    assert changes({"registers": 98, "local_accesses": 0}) == []
    assert changes({"registers": 103, "local_accesses": 0}) == ["merge: registers was 100, is 103"]
    assert changes({"registers": 97, "local_accesses": 0}) == ["merge: registers was 100, is 97"]
    assert changes({"registers": 100, "local_accesses": 1}) == ["merge: local_accesses was 0, is 1"]
    assert changes({"registers": 100}) == ["merge: local_accesses was 0, is None"]
    assert "not comparable" in changes({"registers": 100, "local_accesses": 0}, nvcc="13.1.5")[0]


def test_kernels_that_came_or_went_are_named():
    found = static_record.changes({"merge": line()}, {"write": {}}, "13.0.88")
    assert found == [
        "merge: recorded, but there is no such kernel any more",
        "write: a kernel that was never recorded",
    ]
    with pytest.raises(LookupError, match=r"0 compiled kernels are paged_attention_.*; there are none of its name"):
        matching(["gather_cache_kernel<Int8Gather<2>>"], HOT_KERNELS[0])


def test_newest_run_counts(tmp_path):
    later = "2026-01-02T00:00:00+00:00"
    for record_line in (line("merge"), line("write"), line("write", later, registers=90), line(arch="80")):
        record.append(record_line, tmp_path)
    found = static_record.newest(static_record.read(tmp_path), "90")
    assert {name: kept.figures["registers"] for name, kept in found.items()} == {"write": 90}
    assert static_record.newest(static_record.read(tmp_path), "75") == {}


def test_objects_are_checked(tmp_path, monkeypatch, capsys):
    """From the objects to the exit status, without nvcc: the listing stands in for what an object disassembles to."""
    resources = {"name": "a_kernel", "symbol": "kernel", "registers": 40, "stack": 0, "spills": 0, "static_shared": 0}
    (tmp_path / "a.90.json").write_text(json.dumps([resources]))
    hot = replace(HOT_KERNELS[0], name="a", function="a_kernel", dynamic_shared=lambda: 0)
    monkeypatch.setattr(cuda_static, "HOT_KERNELS", [hot])
    monkeypatch.setattr(cuda_static, "nvcc_version", lambda: "13.0.88")
    monkeypatch.setattr(sass, "disassemble", lambda path: EXCERPT)
    results = tmp_path / "cuda"
    cuda_static.main(tmp_path, results=results)
    cuda_static.main(tmp_path, check=True, results=results)
    assert "1 kernels of SM90 are as recorded" in capsys.readouterr().out
    (tmp_path / "a.90.json").write_text(json.dumps([resources | {"registers": 48}]))
    with pytest.raises(SystemExit, match="SM90, a: registers was 40, is 48"):
        cuda_static.main(tmp_path, check=True, results=results)
    monkeypatch.setattr(cuda_static, "HOT_KERNELS", [replace(hot, function="another_kernel")])
    with pytest.raises(SystemExit, match=r"(?s)0 compiled kernels are another_kernel.*recorded, but there is no such"):
        cuda_static.main(tmp_path, check=True, results=results)
    with pytest.raises(SystemExit, match="has no objects"):
        cuda_static.main(tmp_path / "empty", results=results)


def test_committed_records():
    records = static_record.read()
    kernels = {hot.name: hot for hot in HOT_KERNELS}
    for arch in LIMITS:
        found = static_record.newest(records, arch)
        assert found.keys() == kernels.keys(), arch
        for name, kept in found.items():
            assert re.fullmatch(kernels[name].function, kept.function)
            assert static_record.forbidden(kept.figures) == []
            assert not kept.dirty


def test_bounds_stand_beside_one_another(tmp_path):
    for hot in HOT_KERNELS:
        counted = {tables.BOUND: 50.0, "resident_blocks": 0 if "32 rows" in hot.name else 1}
        record.append(
            line(hot.name, arch="75", **(counted if hot.name.startswith("decode") else {})), tmp_path / "cuda"
        )
    assert "T4 (SM75) 50 against 5.0" in tables.bounds_sentence(tmp_path)
    assert "| T4 (SM75) | 5.0 | 50.0, 9.9x | 50.0, 9.9x | does not fit |" in tables.bounds_table(tmp_path)


def test_tables_without_records(tmp_path):
    for table in (*tables.TABLES.values(), tables.bounds_sentence):
        assert table(tmp_path) == tables.NOT_RECORDED

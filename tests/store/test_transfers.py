"""The threads that carry blocks between the cache and the folder, without an engine."""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch

from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.store.codecs import Exact, Payload
from vllm_int8kv.store.engine.contents import Block, PageContents
from vllm_int8kv.store.engine.transfers import Outcome, Transfers
from vllm_int8kv.store.pages import PagedLayer
from vllm_int8kv.store.registry import make_codec

NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE = 64, 4, 32, 64
STORE_THREADS = 3


def take_until(transfers: Transfers, name: str, count: int) -> Outcome:
    """All that happened until something has been counted so often."""
    deadline, found = time.monotonic() + 60, Outcome()
    while found.counts.get(name, 0) < count:
        assert time.monotonic() < deadline, f"{found.counts} of {count} {name}"
        taken = transfers.take_outcome(0.01)
        found.saved |= taken.saved
        found.unsaved |= taken.unsaved
        for counted, value in taken.counts.items():
            found.count(counted, value)
    return found


def make_layers() -> list[PagedLayer]:
    pages = K8V8.allocate(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    pages.view(torch.uint8).random_(0, 64)
    sizes = {"head_size": HEAD_SIZE, "num_kv_heads": NUM_KV_HEADS, "block_size": BLOCK_SIZE}
    return [PagedLayer(f"layer {number}", pages.clone(), cache_format=K8V8, **sizes) for number in range(4)]


class Counted(Exact):
    """Knows of how many blocks it was asked at a time."""

    def __init__(self, layers: Sequence[PagedLayer]) -> None:
        super().__init__(layers)
        self.num_blocks: list[int] = []

    def encode(self, pages: Sequence[torch.Tensor]) -> list[Payload]:
        self.num_blocks.append(len(pages[0]))
        return super().encode(pages)


def test_blocks_of_all_requests_of_a_step_are_encoded_together(tmp_path: Path):
    """As many as may wait: the beginnings of all prefixes; they are files of one age, the first ones the youngest."""
    codec = Counted(make_layers())
    contents = PageContents(codec)
    transfers = Transfers(
        tmp_path, "namespace", contents, "exact", max_bytes=None, max_queued_bytes=4 * contents.block_bytes
    )
    blocks = [Block(f"{number:064x}", number, number % 3) for number in range(6)]  # of two requests
    try:
        transfers.save(blocks)
        found = take_until(transfers, "saved_blocks", 4)
    finally:
        transfers.finish()
    ends = {blocks[2].hash, blocks[5].hash}
    assert (found.saved, found.unsaved) == ({block.hash for block in blocks} - ends, ends)
    assert codec.num_blocks == [4]
    used = {path.stem: path.stat().st_mtime for path in tmp_path.rglob("*.kv")}
    first, second, third, fourth = (used[blocks[number].hash] for number in (0, 3, 1, 4))
    assert first == second > third == fourth


@pytest.mark.parametrize("codec", ["exact", "k6v4", "bound:0.2"])
def test_no_thread_gets_threads_of_its_own(codec, tmp_path: Path, set_num_threads):
    """GNU OpenMP counts them for ever, and lets all teams of a process sleep once there are more than cores."""
    set_num_threads(2)
    layers = make_layers()
    blocks = [Block(f"{number:064x}", number, number) for number in range(NUM_BLOCKS)]
    torch.ones(1 << 22).add_(1)  # the team of this thread
    process = psutil.Process()
    before = process.num_threads()
    contents = PageContents(make_codec(codec, layers))
    transfers = Transfers(tmp_path, "namespace", contents, codec, max_bytes=None, max_queued_bytes=1 << 30)
    try:
        transfers.save(blocks)
        take_until(transfers, "saved_blocks", NUM_BLOCKS)
        transfers.load("request", blocks)
        take_until(transfers, "loaded_blocks", NUM_BLOCKS)
        assert process.num_threads() <= before + STORE_THREADS
    finally:
        transfers.finish()

"""The threads that carry blocks between the cache and the folder, without an engine."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from vllm_int8kv.cache.formats import K8V8
from vllm_int8kv.store.engine.contents import Block, PageContents
from vllm_int8kv.store.engine.threads import SAVE_NICENESS
from vllm_int8kv.store.engine.transfers import Transfers
from vllm_int8kv.store.pages import PagedLayer
from vllm_int8kv.store.registry import make_codec

NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE = 64, 4, 32, 64
STORE_THREADS = 3


def take_until(transfers: Transfers, name: str, count: int) -> None:
    deadline, found = time.monotonic() + 60, 0
    while found < count:
        assert time.monotonic() < deadline, f"{found} of {count} {name}"
        found += transfers.take_outcome(0.01).counts.get(name, 0)


@pytest.mark.parametrize("codec", ["exact", "k6v4", "bound:0.2"])
def test_no_thread_gets_threads_of_its_own(codec, tmp_path: Path, set_num_threads):
    """GNU OpenMP counts them for ever, and lets all teams of a process sleep once there are more than cores."""
    set_num_threads(2)
    pages = K8V8.allocate(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    pages.view(torch.uint8).random_(0, 64)
    sizes = {"head_size": HEAD_SIZE, "num_kv_heads": NUM_KV_HEADS, "block_size": BLOCK_SIZE}
    layers = [PagedLayer(f"layer {number}", pages.clone(), cache_format=K8V8, **sizes) for number in range(4)]
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
        own = os.getpriority(os.PRIO_PROCESS, 0)
        niceness = {t.name: os.getpriority(os.PRIO_PROCESS, t.native_id) - own for t in threading.enumerate()}
        assert niceness["kv-store-save"] == min(SAVE_NICENESS, 19 - own), "nobody waits for it"
        assert niceness["kv-store-load"] == 0, "requests wait for it"
    finally:
        transfers.finish()

"""Pages of a GPU's cache on their way to the host and back, on a GPU that is played: whatever order its streams take.

What a stream is given runs when somebody waits for it, from one stream or the other first, as far as events allow.
"""

import contextlib
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vllm_int8kv.store.codecs import Exact
from vllm_int8kv.store.engine import contents as contents_module
from vllm_int8kv.store.engine import gpu_pages
from vllm_int8kv.store.engine.contents import Block, PageContents, Taken
from vllm_int8kv.store.engine.gpu_pages import GpuPageContents
from vllm_int8kv.store.engine.transfers import Transfers
from vllm_int8kv.store.files import Header, read
from vllm_int8kv.store.pages import PagedLayer, copy_in

NUM_BLOCKS, PAGE = 4, 8
OLD, NEW, LOADED = 1.0, 2.0, 3.0


class PlayedEvent:
    def __init__(self, device: "PlayedGpu") -> None:
        self._device, self.is_done = device, True

    def record(self, stream: "PlayedStream") -> None:
        self.is_done = False
        stream.launch(lambda: setattr(self, "is_done", True))

    def query(self) -> bool:
        return self.is_done

    def synchronize(self) -> None:
        self._device.run_until(self)


class PlayedStream:
    def __init__(self, device: "PlayedGpu") -> None:
        self._device = device
        self.waiting: deque[Callable[[], None] | PlayedEvent] = deque()

    def launch(self, run: Callable[[], None]) -> None:
        self.waiting.append(run)

    def wait_event(self, event: PlayedEvent) -> None:
        self.waiting.append(event)

    def record_event(self) -> PlayedEvent:
        event = PlayedEvent(self._device)
        event.record(self)
        return event

    def wait_stream(self, other: "PlayedStream") -> None:
        self.wait_event(other.record_event())

    def run_next(self) -> bool:
        """Whether anything could be run."""
        if not self.waiting or (isinstance(self.waiting[0], PlayedEvent) and not self.waiting[0].is_done):
            return False
        head = self.waiting.popleft()
        if not isinstance(head, PlayedEvent):
            head()
        return True


class PlayedGpu:
    def __init__(self, runs_steps_first: bool) -> None:
        self.steps, self.copies = PlayedStream(self), PlayedStream(self)
        self.current = self.steps
        self._order = (self.steps, self.copies) if runs_steps_first else (self.copies, self.steps)

    def run_until(self, event: PlayedEvent | None = None) -> None:
        """Until an event, or as far as it goes."""
        while (event is None or not event.is_done) and any(stream.run_next() for stream in self._order):
            pass
        assert event is None or event.is_done

    @contextlib.contextmanager
    def on_stream(self, stream: PlayedStream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture(params=[True, False], ids=["steps_first", "copies_first"])
def gpu(request, monkeypatch) -> PlayedGpu:
    played = PlayedGpu(request.param)

    def to_host(pages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        host = torch.zeros(len(index), *pages.shape[1:])
        played.current.launch(lambda: host.copy_(pages[index]))
        return host

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: played.copies)
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: PlayedEvent(played))
    monkeypatch.setattr(torch.cuda, "stream", played.on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: played.current)
    monkeypatch.setattr(gpu_pages, "_to_host", to_host)
    monkeypatch.setattr(gpu_pages, "_to_device", lambda x, device: x)
    monkeypatch.setattr(contents_module, "copy_in", lambda *args: played.current.launch(lambda: copy_in(*args)))
    return played


def make_layers() -> list[PagedLayer]:
    return [PagedLayer(f"layer {i}", torch.zeros(NUM_BLOCKS, PAGE), block_size=0) for i in range(2)]


@pytest.fixture
def layers() -> list[PagedLayer]:
    return make_layers()


@pytest.fixture
def contents(gpu, layers) -> GpuPageContents:
    return GpuPageContents(Exact(layers))


def run_step(gpu, contents, layers, block_id: int, value: float, allocated: tuple[int, ...] = ()) -> None:
    """Launch a step that writes to a block."""
    contents.begin_step({}, allocated)
    for layer in layers:
        gpu.steps.launch(lambda pages=layer.pages: pages[block_id].fill_(value))


BLOCK = Block("hash", 2)


def test_a_page_is_copied_when_its_step_has_written_it(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)
    taken = contents.take([BLOCK])
    taken.wait()
    assert all((part == OLD).all() for part in taken.parts)


def test_a_block_is_not_written_anew_before_its_page_is_copied(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)
    taken = contents.take([BLOCK])
    run_step(gpu, contents, layers, 2, NEW, allocated=(1, 2))
    gpu.run_until()
    assert all((part == OLD).all() for part in taken.parts)
    assert all((layer.pages[2] == NEW).all() for layer in layers)


def test_no_blocks_are_no_pages(gpu, contents, layers):
    taken = contents.take([])
    taken.wait()
    assert taken.blocks == [] and [len(part) for part in taken.parts] == [0, 0]


def test_steps_that_write_to_other_blocks_wait_for_no_copy(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)
    contents.take([BLOCK])
    run_step(gpu, contents, layers, 3, NEW, allocated=(3,))
    assert not any(isinstance(item, PlayedEvent) for item in gpu.steps.waiting)


def test_steps_wait_for_no_copy_that_has_been_made(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)
    contents.take([BLOCK]).wait()
    gpu.run_until()
    run_step(gpu, contents, layers, 2, NEW, allocated=(2,))
    assert not any(isinstance(item, PlayedEvent) for item in gpu.steps.waiting)


def test_what_had_a_block_before_does_not_overwrite_what_is_loaded(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)  # of a request that has ended meanwhile
    contents.begin_step({}, ())
    contents.put([BLOCK], [torch.full((1, PAGE), LOADED) for _ in layers])
    gpu.run_until()
    assert all((layer.pages[2] == LOADED).all() for layer in layers)


def test_what_is_loaded_is_there_when_the_load_has_ended(gpu, contents, layers):
    contents.put([BLOCK], [torch.full((1, PAGE), LOADED) for _ in layers])
    assert all((layer.pages[2] == LOADED).all() for layer in layers)


def test_a_load_does_not_overwrite_a_page_that_is_to_be_copied(gpu, contents, layers):
    run_step(gpu, contents, layers, 2, OLD)
    taken = contents.take([BLOCK])
    contents.begin_step({}, ())
    contents.put([BLOCK], [torch.full((1, PAGE), LOADED) for _ in layers])
    gpu.run_until()
    assert all((part == OLD).all() for part in taken.parts)


class Late(PageContents):
    """Copies that are made when somebody waits for them."""

    def take(self, blocks) -> Taken:
        made = super().take(blocks)
        parts = [torch.full_like(part, -1.0) for part in made.parts]
        return Taken(made.blocks, parts, lambda: [part.copy_(own) for part, own in zip(parts, made.parts, strict=True)])


def test_pages_are_encoded_when_they_have_been_copied(tmp_path: Path):
    layers = make_layers()
    layers[0].pages[2], layers[1].pages[2] = OLD, NEW
    transfers = Transfers(tmp_path, "own", Late(Exact(layers)), "exact", max_bytes=None, max_queued_bytes=1 << 20)
    transfers.save([BLOCK])
    transfers.finish()
    (path,) = tmp_path.rglob("hash*")
    _, payload = read(path, Header("own", "hash", "exact", 0))
    assert torch.frombuffer(bytearray(payload), dtype=torch.float32).tolist() == [OLD] * PAGE + [NEW] * PAGE

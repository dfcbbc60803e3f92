"""Pages of a cache on a GPU: copied by a stream of their own, through pinned memory.

The stream follows the steps that wrote a page, and a step that writes to a block anew follows the copy of its page.
Neither keeps the thread that launches steps waiting.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from vllm_int8kv.store.codecs import Codec
from vllm_int8kv.store.engine.contents import Block, PageContents, Taken, Written

STAGED_BYTES = 8 << 20
"""Of a layer's pages that lie side by side on the device at a time, on their way to the host: the rest of its memory is
the cache's."""


@dataclass(frozen=True)
class Copying:
    """Pages on their way to the host."""

    block_ids: frozenset[int]
    done: torch.cuda.Event


class GpuPageContents(PageContents):
    """The pages themselves, of layers on one GPU."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        (self._device,) = {layer.pages.device for layer in codec.layers}
        self._stream = torch.cuda.Stream(self._device)
        self._step_began: torch.cuda.Event | None = None
        self._copying: list[Copying] = []

    def begin_step(self, written: Mapping[int, Written], allocated: Collection[int]) -> None:
        steps = torch.cuda.current_stream(self._device)
        self._copying = [own for own in self._copying if not own.done.query()]
        for own in self._copying:
            if not own.block_ids.isdisjoint(allocated):
                steps.wait_event(own.done)
        self._step_began = steps.record_event()

    def take(self, blocks: Sequence[Block]) -> Taken:
        block_ids = [block.block_id for block in blocks]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            index = _to_device(torch.tensor(block_ids, dtype=torch.long), self._device)
            parts = [_to_host(layer.pages, index) for layer in self.codec.layers]
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        self._copying.append(Copying(frozenset(block_ids), done))
        return Taken(list(blocks), parts, done.synchronize)

    def put(self, blocks: Sequence[Block], parts: Sequence[torch.Tensor]) -> None:
        if self._step_began is not None:  # what had the blocks before may still write to them
            self._stream.wait_event(self._step_began)
        with torch.cuda.stream(self._stream):
            super().put(blocks, [_to_device(part, self._device) for part in parts])
            done = torch.cuda.Event(blocking=True)
            done.record(self._stream)
        done.synchronize()


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that is there when the current stream gets so far; only from pinned memory does the host not wait."""
    return x.pin_memory().to(device, non_blocking=True)


def _to_host(pages: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Copies of some pages, in pinned memory, which are there when the current stream gets so far."""
    host = torch.empty(len(index), *pages.shape[1:], dtype=pages.dtype, pin_memory=True)
    num_staged = max(1, STAGED_BYTES // (pages[0].numel() * pages.itemsize))
    for own, part in zip(host.split(num_staged), index.split(num_staged), strict=True):
        own.copy_(pages.index_select(0, part), non_blocking=True)
    return host

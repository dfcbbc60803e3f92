"""What the store did, as vLLM's connector stats: in its log, and for Prometheus."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "loaded_blocks": "Blocks that were loaded from the store.",
    "loaded_bytes": "Bytes that were read of the files of loaded blocks.",
    "load_seconds": "Time that loads took, from the request to the last block.",
    "spared_seconds": "Time that computing the loaded blocks would have taken, by the pace of computed prompts.",
    "failed_blocks": "Blocks whose file could not be used, and that were computed again.",
    "missing_blocks": "Blocks whose file was evicted before it was read, and that were computed again.",
    "saved_blocks": "Blocks that were written to the store.",
    "saved_bytes": "Bytes that were written.",
    "saved_page_bytes": "Bytes that the pages of written blocks take in the cache.",
    "dropped_blocks": "Blocks that were not written because the disk did not keep up.",
    "failed_writes": "Blocks that could not be written.",
    "evicted_files": "Files that had to go because the store was full.",
}


@dataclass
class StoreStats(KVConnectorStats):
    """Counts of one interval, by the names of `COUNTERS`."""

    def reset(self) -> None:
        self.data = {}

    def add(self, name: str, value: float = 1) -> None:
        """Count something."""
        self.data[name] = self.data.get(name, 0) + value

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.add(name, value)
        return self

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 3) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        return not self.data


@dataclass
class PromptPace:
    """How fast an engine computes prompts, as a mean of all steps with a part of one.

    Attention takes longer the more tokens are before, so it is too little for the ends of prompts longer than those.
    """

    seconds: float = 0.0
    num_tokens: int = 0
    unvalued_tokens: int = 0
    """that somebody asked about before anything was computed"""

    def note_step(self, seconds: float, num_tokens: int) -> None:
        """A step has computed a part of a prompt."""
        self.seconds += seconds
        self.num_tokens += num_tokens

    def seconds_for(self, num_tokens: int) -> float:
        """What computing tokens would take; as long as that is not known, 0, and later so much more."""
        self.unvalued_tokens += num_tokens
        if not self.num_tokens:
            return 0.0
        valued, self.unvalued_tokens = self.unvalued_tokens, 0
        return valued * self.seconds / self.num_tokens


class StorePromMetrics(KVConnectorPromMetrics):
    """The counters as `vllm:kv_store_<name>_total`."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {}
        for name, meaning in COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:kv_store_{name}", documentation=meaning, labelnames=self._labelnames
            )
            self._counters[name] = {
                engine: counter.labels(*values) for engine, values in per_engine_labelvalues.items()
            }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            self._counters[name][engine_idx].inc(value)

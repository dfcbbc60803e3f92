"""What the store did, as vLLM's connector stats: in its log, and for Prometheus."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "loaded_blocks": "Blocks that were loaded from the store.",
    "loaded_bytes": "Bytes that were read of the files of loaded blocks.",
    "load_seconds": "Time that loads took, from the request to the last block.",
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

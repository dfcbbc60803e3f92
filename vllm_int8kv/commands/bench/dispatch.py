"""Requests to replicas and rows back, whatever happens to the replicas.

Each replica gets its share at once. When one dies, what it has not answered goes once more to those that are left;
what is lost a second time, or with the last replica, fails. Every request ends in exactly one row.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray

from vllm_int8kv.commands.bench.replica import Progress, Row
from vllm_int8kv.commands.bench.workload import Request, shares

MAX_ATTEMPTS = 2

OnProgress = Callable[[int, int, int], object]
"""(replica, output tokens since the last call, requests finished since the last call)"""


@dataclass
class Outcome:
    """What a run came to."""

    rows: dict[str, Row] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    """replica → why it died"""
    resubmitted: int = 0
    peak_running_seqs: int = 0
    duration_s: float = 0.0


@dataclass
class _Batch:
    """Requests that a replica is answering."""

    replica: int
    attempt: int
    open: dict[str, Request]
    """what has not been answered yet"""
    stream: Any = None


class Dispatch:
    """One run over a list of replicas (actor handles); replicas found dead are remembered for the next run."""

    def __init__(self, replicas: list[Any]) -> None:
        self.replicas = dict(enumerate(replicas))

    def run(self, requests: list[Request], max_concurrency: int | None, on_progress: OnProgress) -> Outcome:
        """Send all requests and wait for the last row."""
        outcome, batches = Outcome(), []
        started = time.perf_counter()
        batches += self._send(requests, 1, max_concurrency, outcome)
        while batches:
            by_stream = {batch.stream: batch for batch in batches}
            ready, _ = ray.wait(list(by_stream), num_returns=1)
            batch = by_stream[ready[0]]
            try:
                self._take(batch, ray.get(next(batch.stream)), outcome, on_progress)
            except StopIteration:
                batches.remove(batch)
                if batch.open:
                    raise RuntimeError(f"replica {batch.replica} ended with {len(batch.open)} requests open") from None
            except ray.exceptions.RayError as error:
                batches.remove(batch)
                self._lose(batch.replica, error, outcome)
                batches += self._send(list(batch.open.values()), batch.attempt + 1, max_concurrency, outcome)
        outcome.duration_s = time.perf_counter() - started
        return outcome

    def _send(self, requests: list[Request], attempt: int, limit: int | None, outcome: Outcome) -> list[_Batch]:
        """Share requests among the living. Without any, or after the last attempt, they fail."""
        if attempt > MAX_ATTEMPTS or not self.replicas:
            reason = "its replica was lost twice" if attempt > MAX_ATTEMPTS else "no replica is left"
            for request in requests:
                row = Row(request.request_id, len(request.prompt_token_ids), attempt=attempt - 1, error=reason)
                outcome.rows[request.request_id] = row
            return []
        if attempt > 1:
            outcome.resubmitted += len(requests)
        batches = []
        living = list(self.replicas.items())
        for (index, replica), share in zip(living, shares(requests, len(living)), strict=True):
            if share:
                batch = _Batch(index, attempt, {request.request_id: request for request in share})
                batch.stream = replica.run.options(num_returns="streaming").remote(share, limit)
                batches.append(batch)
        return batches

    def _take(self, batch: _Batch, progress: Progress, outcome: Outcome, on_progress: OnProgress) -> None:
        for row in progress.rows:
            del batch.open[row.request_id]  # a KeyError here would be a request answered twice
            row.replica, row.attempt = batch.replica, batch.attempt
            outcome.rows[row.request_id] = row
        outcome.peak_running_seqs = max(outcome.peak_running_seqs, progress.peak_running_seqs)
        on_progress(batch.replica, progress.output_tokens, len(progress.rows))

    def _lose(self, index: int, error: Exception, outcome: Outcome) -> None:
        replica = self.replicas.pop(index, None)
        if replica is not None:
            ray.kill(replica)  # one that raised still holds its engine
            outcome.lost[index] = reason(error)


def reason(error: Exception) -> str:
    """The line of an error of Ray that says what happened: the exception of our code, or how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, ray.exceptions.RayTaskError) or "creation task" in lines[0]:
        return lines[-1]
    return lines[0]

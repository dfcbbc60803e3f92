"""Runs the steps of a call: a time limit each, all output in one log, a line of summary as soon as one has ended.

A call may be cut off at any moment, by the time that is left on the machine or by the machine itself. What has ended
until then is in the summary, what ran is in the log, and nothing that a step started goes on and disturbs the next.
"""

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

from benchmarks.processes import run_group

SUMMARY = "summary.jsonl"
LEAST_SECONDS = 1.0
"""A step with less time left is not started."""


class Status(StrEnum):
    passed = "passed"
    failed = "failed"
    stopped = "stopped"
    """at its limit, or at that of the call"""
    skipped = "skipped"


@dataclass(frozen=True)
class Step:
    """A command with its time limit."""

    name: str
    command: list[str]
    seconds: float
    is_timing: bool = False
    """waits until nothing else uses the GPU, and does not start if something does not end"""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: a line of the summary."""

    call: str
    step: str
    status: Status
    seconds: float
    detail: str
    commit: str | None


class BusyError(RuntimeError):
    """Something else uses the GPU."""


def run_call(
    call: str,
    steps: Iterable[Step],
    out: Path,
    seconds: float,
    environment: Mapping[str, str],
    wait_until_idle: Callable[[], None],
    commit: str | None = None,
) -> list[Outcome]:
    """Run steps one after the other, whatever becomes of each.

    Args:
        out: gets `CALL.log` and a line per step in `summary.jsonl`; both are appended to.
        seconds: limit of all steps together.
        environment: of every step, beside that of this process.
        wait_until_idle: raises BusyError if that does not come.
        commit: what the summary names.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    outcomes = []
    # So that a call which is told to end takes its step along.
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        for step in steps:
            limit = min(step.seconds, end - time.monotonic())
            started = time.monotonic()
            status, detail = _try(step, limit, out / f"{call}.log", environment, wait_until_idle)
            outcome = Outcome(call, step.name, status, round(time.monotonic() - started, 1), detail, commit)
            with (out / SUMMARY).open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{outcome.step}: {status} {detail}".rstrip(), flush=True)
            outcomes.append(outcome)
    finally:
        signal.signal(signal.SIGTERM, before)
    return outcomes


def _exit(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _try(
    step: Step, limit: float, log: Path, environment: Mapping[str, str], wait_until_idle: Callable[[], None]
) -> tuple[Status, str]:
    if limit < LEAST_SECONDS:
        return Status.skipped, "no time left"
    if step.is_timing:
        try:
            wait_until_idle()
        except BusyError as error:
            return Status.skipped, str(error)
    with log.open("ab", buffering=0) as file:
        file.write(f"=== {step.name}: {shlex.join(step.command)}\n".encode())
        try:
            code = run_group(step.command, file, {**environment, **step.environment}, limit)
        except OSError as error:
            return Status.failed, str(error)
        except subprocess.TimeoutExpired:
            file.write(f"=== {step.name} was stopped after {limit:.0f} s\n".encode())
            return Status.stopped, f"after {limit:.0f} s"
    return (Status.passed, "") if code == 0 else (Status.failed, f"with {code}")

"""What the engines are doing, for whoever waits for them.

On a terminal each engine has a bar with the time that has passed and the time left. A log file gets a line when a
stage begins and one when it ends, each whole and at once, so that `tail -f` shows that something happens.
"""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SPEED_PERIOD = 3600.0
"""Seconds that the estimate of the time left looks back: all of it, because stages report seldom and unevenly."""


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


class EngineProgress:
    """The progress of one engine, from the beginning of the block to its end.

    An engine reports no beginnings: a stage begins when the one before it is done.
    """

    def __init__(self, name: str, stages: Mapping[str, float], bars: Progress, has_lines: bool) -> None:
        self._name, self._stages, self._bars, self._has_lines = name, dict(stages), bars, has_lines
        self._names = list(self._stages)
        self._current, self._since = 0, 0.0
        self._task_id = bars.add_task(name, total=sum(self._stages.values()), start=False)

    def __enter__(self) -> Self:
        self._bars.start_task(self._task_id)
        self._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._end_stages_before(len(self._names))
            self._bars.update(self._task_id, completed=sum(self._stages.values()), description=self._name)
        self._bars.stop_task(self._task_id)

    def update(self, stage: str, done: float) -> None:
        """Note that a share of a stage is done, and all of those before it."""
        index = self._names.index(stage)
        self._end_stages_before(index + 1 if done >= 1 else index)
        before = sum(self._stages[name] for name in self._names[:index])
        self._bars.update(self._task_id, completed=before + done * self._stages[stage])

    def _begin(self) -> None:
        self._since = time.monotonic()
        if self._current < len(self._names):
            what = f"{self._name}: {self._names[self._current]}"
            self._bars.update(self._task_id, description=what)
            if self._has_lines:
                say(self._bars.console, f"{what} ...")

    def _end_stages_before(self, index: int) -> None:
        while self._current < index:
            if self._has_lines:
                took = time.monotonic() - self._since
                say(self._bars.console, f"{self._name}: {self._names[self._current]}, {took:.0f} s")
            self._current += 1
            self._begin()


class ProgressDisplay:
    """The progress of several engines, one after the other.

    Args:
        console: where it goes.
        is_hidden: show nothing, because the logs of the engines are shown instead.
    """

    def __init__(self, console: Console, is_hidden: bool = False) -> None:
        self._has_lines = not (is_hidden or console.is_interactive)
        times = TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("left", style="progress.remaining")
        columns = TextColumn("{task.description:<40}"), BarColumn(bar_width=30), *times
        is_disabled = is_hidden or self._has_lines
        self._bars = Progress(*columns, console=console, disable=is_disabled, speed_estimate_period=SPEED_PERIOD)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def engine(self, name: str, stages: Mapping[str, float]) -> EngineProgress:
        """An engine that may begin later.

        Args:
            name: what lines and bars call it.
            stages: in order, with their shares of the bar.
        """
        return EngineProgress(name, stages, self._bars, self._has_lines)

"""How far the work is: bars with rate and time left on a terminal, a log line now and then anywhere else.

with ProgressBars() as bars:
    cohort = bars.add("cohort", total=len(slides), unit="slides")
    for slide in slides:
        with bars.add(slide.name, total=len(slide), unit="tiles", passing=True) as one:
            for batch in slide:
                one.advance(len(batch))
        cohort.advance()
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

logger = logging.getLogger(__name__)
T = TypeVar("T")


class ProgressBars:
    """A context in which bars are shown one below the other, or logged when standard error is no terminal.

    Args:
        enabled: draw bars; by default when ``console`` is a terminal.
        log_every: seconds between two log lines of one bar where bars are not drawn.
        console: where to draw; standard error by default.
        clock: seconds, for the log lines.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        log_every: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console if console is not None else Console(file=sys.stderr)
        self.log_every, self.clock = log_every, clock
        self._progress: Progress | None = None
        if self.console.is_terminal if enabled is None else enabled:
            self._progress = Progress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                _Rate(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )

    def __enter__(self) -> ProgressBars:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def add(self, description: str, total: int | None = None, unit: str = "items", passing: bool = False) -> Bar:
        """A new bar.

        Args:
            total: how many units there are, if known.
            unit: what is counted, for the rate.
            passing: one of many, such as one slide of a cohort: the bar goes when it is closed, and no log line
                says so.
        """
        return Bar(self, self._progress, description, total, unit, passing)


class Bar:
    """One bar; ``advance`` may be called from any thread. Closing it twice is harmless."""

    def __init__(
        self,
        bars: ProgressBars,
        progress: Progress | None,
        description: str,
        total: int | None,
        unit: str,
        passing: bool,
    ) -> None:
        self.description, self.total, self.unit, self.passing = description, total, unit, passing
        self.done = self._before = 0
        self._bars, self._progress = bars, progress
        self._lock = threading.Lock()
        self._closed = False
        self._started = self._logged = bars.clock()
        self._task = progress.add_task(description, total=total, unit=unit) if progress is not None else None

    def advance(self, count: int = 1) -> None:
        """``count`` more units are done."""
        if self._progress is not None and self._task is not None:
            self.done += count
            self._progress.advance(self._task, count)
            return
        with self._lock:
            self.done += count
            now = self._bars.clock()
            due = now - self._logged >= self._bars.log_every
            if due:
                self._logged = now
        if due:
            logger.info("%s", self._line(now))

    def reach(self, done: int) -> None:
        """``done`` units are done in all; at the first call all but one of them by an earlier run, without a rate."""
        if not self.done:
            self._before = max(done - 1, 0)
        self.advance(done - self.done)

    def describe(self, text: str) -> None:
        """Change the text before the bar, to say how it goes."""
        self.description = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text)

    def close(self) -> None:
        """No more units will come."""
        if self._closed:
            return
        self._closed = True
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self.done if self.total is None else self.total)
            self._progress.stop_task(self._task)
            if self.passing:
                self._progress.remove_task(self._task)
        elif not self.passing:
            seconds = self._bars.clock() - self._started
            logger.info(
                "%s: %d %s in %s%s", self.description, self.done, self.unit, _span(seconds), self._rate(seconds)
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self, now: float) -> str:
        seconds = now - self._started
        if not self.total:
            return f"{self.description}: {self.done} {self.unit}{self._rate(seconds)}"
        share = f"{self.done} of {self.total} {self.unit} ({self.done / self.total:.0%})"
        here = self.done - self._before
        left = f", {_span(seconds / here * (self.total - self.done))} left" if here else ""
        return f"{self.description}: {share}{self._rate(seconds)}{left}"

    def _rate(self, seconds: float) -> str:
        return f", {format_rate((self.done - self._before) / seconds, self.unit)}" if seconds > 0 else ""


def track(
    items: Iterable[T],
    description: str,
    unit: str = "items",
    total: int | None = None,
    bars: ProgressBars | None = None,
    passing: bool = False,
) -> Iterator[T]:
    """``items`` one after the other with a bar; ``bars`` puts it among others.

    >>> sum(track([1, 2, 3], "adding"))
    6
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    if bars is None:
        with ProgressBars() as own:
            yield from track(items, description, unit, total, own, passing)
        return
    with bars.add(description, total, unit, passing) as bar:
        for item in items:
            yield item
            bar.advance()


def format_rate(per_second: float, unit: str) -> str:
    """A rate in digits that fit it: ``1240 tiles/s``, ``3.2 tiles/s``, or ``7.5 slides/min`` below one a second."""
    if per_second >= 100:
        return f"{per_second:.0f} {unit}/s"
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{per_second * 60:.1f} {unit}/min"


class _Rate(ProgressColumn):
    """Units per second over the last half minute, or over the whole once finished."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if not speed else format_rate(speed, task.fields["unit"]), style="progress.data.speed")


def _span(seconds: float) -> str:
    """Seconds as a person says them: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

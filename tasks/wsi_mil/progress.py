"""What a person sees while a cohort is prepared: a bar for the slide, a bar for the cohort, tiles per second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from tasks.wsi_mil.cohort import SlideReport


class CohortProgress:
    """Two bars on a terminal; silent where there is none (the log has a line per slide)."""

    def __init__(self, slides: int, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._slides = slides
        self._cohort = self._bars.add_task("cohort", total=slides, count=f"0/{slides} slides", rate="")
        self._slide: TaskID | None = None
        self._slide_id = ""
        self._done, self._fraction = 0, 0.0
        self._tiles, self._start = 0, time.perf_counter()

    def __enter__(self) -> CohortProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def advance(self, slide_id: str, tiles: int, done: int, total: int) -> None:
        """Some tiles of a slide are done."""
        if slide_id != self._slide_id:
            if self._slide is not None:
                self._bars.remove_task(self._slide)
            self._slide = self._bars.add_task(slide_id, total=total, count="", rate="")
            self._slide_id = slide_id
        assert self._slide is not None
        self._tiles += tiles
        self._fraction = done / total if done < total else 0.0
        self._bars.update(self._slide, completed=done, count=f"{done}/{total} tiles")
        self._refresh()

    def slides_done(self, done: int) -> None:
        """So many slides are finished, whatever became of them."""
        self._done = done
        self._refresh()

    def _refresh(self) -> None:
        rate = self._tiles / max(time.perf_counter() - self._start, 1e-9)
        self._bars.update(
            self._cohort,
            completed=self._done + self._fraction,
            count=f"{self._done}/{self._slides} slides",
            rate=f"{rate:.0f} tiles/s",
        )


def show_plan(reports: Sequence[SlideReport], out: Path) -> None:
    """Print what a run would do."""
    table = Table(title=f"action=prepare, dry run; nothing is written to {out}")
    for name in ("slide", "what", "tiles", "µm/px", "of tiles", "remarks"):
        table.add_column(name, justify="right" if name in ("tiles", "µm/px", "of tiles") else "left", overflow="fold")
    for r in reports:
        numbers = [
            str(r.tiles) if r.tiles is not None else "",
            *(f"{v:.4g}" if v else "" for v in (r.mpp, r.achieved_mpp)),
        ]
        table.add_row(r.slide_id, r.status, *numbers, r.reason)
    total = sum(r.tiles or 0 for r in reports if r.status == "would do")
    table.caption = f"{sum(r.status == 'would do' for r in reports)} slides to do, {total} tiles"
    Console().print(table)

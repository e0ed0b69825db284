"""The slides of a cohort: which files they are, and the table that says what became of each."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pandas as pd

from kernels.errors import InputError
from tasks.common.files import atomic_path, safe_id
from tasks.wsi_mil.locks import FileLock
from tasks.wsi_mil.slides import files_of_slides


@dataclass(frozen=True)
class SlideFile:
    """A slide's id and file."""

    slide_id: str
    path: Path


def find_slides(source: str | Path) -> list[SlideFile]:
    """The slides of a folder (with its sub-folders), a single file, or a CSV with a column ``slide`` or ``path``.

    Paths in the CSV are relative to it; a column ``slide_id`` names the slides, else they have their file's name.

    Raises:
        InputError: nothing is there, a column is missing, an id is unsafe, or two files have the same id.
    """
    source = Path(source)
    if not source.exists():
        raise InputError(
            f"data.slides={source} does not exist; give a folder of slides, a slide, or a CSV that lists them."
        )
    if source.suffix.lower() == ".csv":
        slides = _listed(source)
    else:
        slides = [SlideFile(p.stem, p) for p in (files_of_slides(source) if source.is_dir() else [source])]
    if not slides:
        raise InputError(
            f"data.slides={source} holds no slides (.svs, .ndpi, .mrxs, .tif, .tiff, .scn, .bif, .czi, .dcm, ...)."
        )
    by_id: dict[str, SlideFile] = {}
    for slide in slides:
        safe_id(slide.slide_id, str(source))
        # File names that differ in capitals only are one file on many systems.
        other = by_id.setdefault(slide.slide_id.lower(), slide)
        if other is not slide:
            raise InputError(
                f"slide id '{slide.slide_id}' is there twice, {other.path} and {slide.path}; rename one, or list the "
                "slides "
                "in a CSV with the columns slide_id,path."
            )
    return sorted(slides, key=lambda slide: slide.slide_id)


def _listed(path: Path) -> list[SlideFile]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"data.slides={path} cannot be read as CSV ({' '.join(str(error).split())}).") from error
    column = next((c for c in ("path", "slide") if c in table.columns), None)
    if column is None:
        raise InputError(
            f"data.slides={path} has the columns {', '.join(map(str, table.columns))}; it needs 'path' or 'slide'."
        )
    files = [path.parent / name for name in table[column]]
    ids = list(table["slide_id"]) if "slide_id" in table.columns else [file.stem for file in files]
    return [SlideFile(slide_id, file) for slide_id, file in zip(ids, files, strict=True)]


@dataclass
class SlideReport:
    """One row of ``slides.csv``.

    Attributes:
        status: ``done``, ``skipped`` (was complete, or another process has it), ``failed``; ``would do`` in a dry run.
        reason: why it failed or was skipped; remarks on a slide that is done.
        tiles: how many are in the feature file.
        mpp, requested_mpp, achieved_mpp: micrometres per pixel of the slide, asked for, and of the tiles.
        seconds: of work on this slide.
    """

    slide_id: str
    path: str
    status: str
    reason: str = ""
    tiles: int | None = None
    mpp: float | None = None
    requested_mpp: float | None = None
    achieved_mpp: float | None = None
    seconds: float | None = None


class SlidesTable:
    """``slides.csv``: rewritten as a whole after each slide; rows of other runs and processes are kept."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def update(self, reports: Iterable[SlideReport]) -> None:
        """Set the rows of these slides."""
        with self._locked():
            rows = {row["slide_id"]: row for row in self.rows()}
            for report in reports:
                rows[report.slide_id] = {k: _text(v) for k, v in asdict(report).items()}
            text = io.StringIO()
            writer = csv.DictWriter(
                text, [f.name for f in fields(SlideReport)], extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows[key] for key in sorted(rows))
            with atomic_path(self.path) as temporary:
                temporary.write_text(text.getvalue(), encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """The rows as they are on disk."""
        try:
            with self.path.open(newline="", encoding="utf-8") as file:
                return [row for row in csv.DictReader(file) if row.get("slide_id")]
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        give_up = time.monotonic() + 60
        while not lock.acquire():
            if time.monotonic() > give_up:
                raise InputError(
                    f"{self.path} is being written by {lock.holder()} for a minute; if that process is gone, remove "
                    f"{lock.path}."
                )
            time.sleep(0.02)
        try:
            yield
        finally:
            lock.release()


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)

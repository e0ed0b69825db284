"""One HTML file that shows a run: no other file, no network, no script; light or dark, on a phone or on paper.

Report("Tumour or normal", "5 folds, 120 patients").add_heading("Results").add_table(table).write("report.html")
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from tasks.common.bootstrap import Interval, Spread
from tasks.common.files import atomic_path
from tasks.common.metrics import METRIC_LABELS
from tasks.common.plots import png_bytes
from tasks.common.report_style import STYLE

Picture: TypeAlias = Figure | str | Path
_LONGEST_SIDE = 1600  # pixels of an embedded picture; whole slides' overlays are far larger than any screen


class Report:
    """A page put together from top to bottom; every method that adds something gives the report back.

    All text is escaped: names of classes and files may hold any character.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.subtitle = title, subtitle
        self._body: list[str] = []
        self._headings: list[tuple[str, str]] = []

    def add_heading(self, text: str) -> Report:
        """Begin a section; it is listed in the contents at the top."""
        anchor = f"section-{len(self._headings) + 1}"
        self._headings.append((anchor, text))
        self._body.append(f'<h2 id="{anchor}">{_text(text)}</h2>')
        return self

    def add_text(self, text: str) -> Report:
        """A paragraph; a blank line begins another."""
        self._body += [f"<p>{_text(part.strip())}</p>" for part in text.split("\n\n") if part.strip()]
        return self

    def add_notes(self, notes: Sequence[str]) -> Report:
        """Sentences that the reader must not miss, such as metrics that are undefined; nothing for an empty list."""
        if notes:
            items = "".join(f"<li>{_text(note)}</li>" for note in notes)
            self._body.append(f'<aside class="notes"><ul>{items}</ul></aside>')
        return self

    def add_key_figures(self, figures: Sequence[tuple[str, str, str]]) -> Report:
        """The few numbers that matter, large: (label, value, small print) each."""
        tiles = "".join(
            f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd><dd class=small>{_text(small)}</dd></div>"
            for label, value, small in figures
        )
        self._body.append(f'<dl class="key">{tiles}</dl>')
        return self

    def add_table(self, table: pd.DataFrame | Sequence[Mapping[str, object]], caption: str = "") -> Report:
        """Rows under a header; numbers are set right-aligned with three significant digits after the point.

        A column is numeric when all its values are numbers or missing; missing values are shown as a dash.
        """
        frame = table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table))
        columns = [frame.iloc[:, k].tolist() for k in range(frame.shape[1])]
        classes = [' class="number"' if _is_numeric(values) else "" for values in columns]
        head = "".join(f"<th{c}>{_text(name)}</th>" for name, c in zip(frame.columns, classes, strict=True))
        rows = "".join(
            "<tr>" + "".join(f"<td{c}>{_cell(v)}</td>" for v, c in zip(row, classes, strict=True)) + "</tr>"
            for row in zip(*columns, strict=True)
        )
        title = f"<caption>{_text(caption)}</caption>" if caption else ""
        self._body.append(
            f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
        return self

    def add_figure(self, picture: Picture, caption: str = "") -> Report:
        """A matplotlib figure or a picture file, embedded; files with a side beyond 1600 pixels are scaled down."""
        self._body.append(_figure(picture, caption))
        return self

    def add_gallery(self, pictures: Sequence[tuple[Picture, str]]) -> Report:
        """Several (picture, caption) side by side, as many in a row as the screen has room for."""
        if pictures:
            shape = "gallery pairs" if len(pictures) in (2, 4) else "gallery"  # no picture alone in its row
            self._body.append(f'<div class="{shape}">{"".join(_figure(p, c) for p, c in pictures)}</div>')
        return self

    def add_details(self, summary: str, text: str) -> Report:
        """Long text, such as a configuration, folded away under ``summary``."""
        self._body.append(f"<details><summary>{_text(summary)}</summary><pre>{_text(text)}</pre></details>")
        return self

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{anchor}">{_text(text)}</a>' for anchor, text in self._headings)
        contents = f'<nav aria-label="Contents">{links}</nav>' if len(self._headings) > 1 else ""
        subtitle = f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n'
            f"<title>{_text(self.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<header><h1>{_text(self.title)}</h1>{subtitle}{contents}</header>\n"
            + "\n".join(self._body)
            + "\n</main>\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page; a killed run leaves the old file or the whole new one.

        Raises:
            InputError: the folder cannot be written.
        """
        with atomic_path(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")
        return Path(path)


def metric_rows(
    pooled: Mapping[str, float],
    intervals: Mapping[str, Interval] | None = None,
    spread: Mapping[str, Spread] | None = None,
    n: int | None = None,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """A table for :meth:`Report.add_table`: value over all predictions with its interval, and mean ± SD over folds.

    The two kinds of uncertainty stand in columns of their own: the interval is about other patients, the deviation
    about other splits and seeds.

    Args:
        pooled: value of each metric on all test predictions together.
        intervals: their bootstrap intervals.
        spread: mean and deviation over folds or seeds.
        n: number of cases (patients) behind the pooled values.
        names: metrics to show; by default those of :data:`~tasks.common.metrics.METRIC_LABELS` that ``pooled`` has.
    """
    rows = []
    for name in names if names is not None else [m for m in METRIC_LABELS if m in pooled]:
        row = {"Metric": METRIC_LABELS.get(name, name), "All test predictions": format_value(pooled[name])}
        if intervals:
            ends = intervals.get(name)
            known = ends is not None and not math.isnan(ends.low)
            row["95 % interval"] = f"{format_value(ends.low)} – {format_value(ends.high)}" if ends and known else "–"
        if spread:
            over = spread.get(name)
            row["Mean ± SD over folds"] = format_spread(over) if over else "–"
            row["Folds"] = str(over.n) if over else "0"
        if n is not None:
            row["n"] = str(n)
        rows.append(row)
    return pd.DataFrame(rows)


def format_value(value: float) -> str:
    """Three decimals, or a dash for what is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def format_spread(spread: Spread) -> str:
    """Mean ± standard deviation; the mean alone where there is one value."""
    if math.isnan(spread.std):
        return format_value(spread.mean)
    return f"{format_value(spread.mean)} ± {format_value(spread.std)}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _cell(value: object) -> str:
    if _is_missing(value):
        return "–"
    if isinstance(value, float):
        return f"{value:.3f}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.3g}"
    return _text(value)


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_numeric(values: Sequence[object]) -> bool:
    """Numbers, or text that begins as a number does ('0.912 ± 0.03'), or missing; not all missing."""
    present = [v for v in values if not _is_missing(v) and v != "–"]
    return bool(present) and all(
        (isinstance(v, int | float) and not isinstance(v, bool)) or _begins_with_number(v) for v in present
    )


def _begins_with_number(value: object) -> bool:
    first = value.split(maxsplit=1)[0] if isinstance(value, str) and value.strip() else ""
    unsigned = first.lstrip("-−+")
    # an id such as 0042 is text; so is a lone date
    return unsigned.replace(".", "", 1).isdigit() and not (
        unsigned.isdigit() and len(unsigned) > 1 and unsigned[0] == "0"
    )


def _figure(picture: Picture, caption: str) -> str:
    media, content = ("image/png", png_bytes(picture)) if isinstance(picture, Figure) else _file(Path(picture))
    source = f"data:{media};base64,{base64.b64encode(content).decode()}"
    below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" alt="{_text(caption) or "figure"}">{below}</figure>'


def _file(path: Path) -> tuple[str, bytes]:
    """Media type and bytes of a picture file, scaled down when it is larger than a screen."""
    with Image.open(path) as image:
        kind = image.format or ""
        if kind in ("PNG", "JPEG", "GIF", "WEBP") and max(image.size) <= _LONGEST_SIDE:
            return f"image/{kind.lower()}", path.read_bytes()
        flat = image.convert("RGB")
    flat.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = io.BytesIO()
    flat.save(buffer, format="JPEG", quality=88)
    return "image/jpeg", buffer.getvalue()

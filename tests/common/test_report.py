"""A report stands alone, shows text as text, and tells the two kinds of uncertainty apart."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from kernels.errors import InputError
from tasks.common.bootstrap import Interval, Spread
from tasks.common.report import Report, format_spread, metric_rows

NASTY = "<script>alert('x')</script> & \"quotes\""
VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text, with a check that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data.strip())


def small_figure() -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    return figure


def whole_report(tmp_path: Path) -> Report:
    picture = tmp_path / "p.png"
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(picture)
    return (
        Report(NASTY, NASTY)
        .add_key_figures([(NASTY, NASTY, NASTY)])
        .add_notes([NASTY])
        .add_heading(NASTY)
        .add_text(f"{NASTY}\n\nsecond")
        .add_heading("More")
        .add_table(pd.DataFrame({NASTY: [NASTY, None], "n": [1, 2]}), NASTY)
        .add_table([{"a": 1.0}, {"a": float("nan")}])
        .add_figure(small_figure(), NASTY)
        .add_gallery([(picture, NASTY), (small_figure(), "")])
        .add_details(NASTY, NASTY)
    )


def test_user_text_is_shown_and_never_run(tmp_path: Path) -> None:
    page = Page(whole_report(tmp_path).html())
    assert "script" not in page.tags
    assert page.words.count(NASTY) == 17
    assert page.attributes.count(("alt", NASTY)) == 2
    assert "second" in page.words


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    text = whole_report(tmp_path).html()
    links = [value for name, value in Page(text).attributes if name in ("src", "href")]
    assert len(links) == 5
    assert all(link and link.startswith(("data:image/png;base64,", "#section-")) for link in links)
    assert not re.search(r"https?://|@import|url\(", text)


def test_the_contents_lead_to_the_sections() -> None:
    page = Page(Report("t").add_heading("One").add_heading("Two").html())
    targets = [value for name, value in page.attributes if name == "href"]
    assert targets == ["#section-1", "#section-2"]
    assert [v for n, v in page.attributes if n == "id"] == ["section-1", "section-2"]
    assert "nav" not in Page(Report("t").add_heading("One").html()).tags


def test_numbers_are_aligned_and_ids_are_not() -> None:
    table = pd.DataFrame(
        {"id": ["0012", "0013"], "p": [0.12345, None], "n": [4000, 5], "ci": ["0.91 – 0.95", "–"], "small": [1e-9, 2.0]}
    )
    text = Report("t").add_table(table).html()
    assert "<td>0012</td>" in text
    assert '<td class="number">0.123</td>' in text
    assert '<td class="number">–</td>' in text
    assert '<td class="number">4000</td>' in text
    assert '<td class="number">0.91 – 0.95</td>' in text
    assert '<td class="number">1e-09</td>' in text


def test_an_empty_table_and_empty_lists_do_no_harm() -> None:
    page = Page(Report("t").add_table([]).add_notes([]).add_gallery([]).html())
    assert "aside" not in page.tags
    assert "figure" not in page.tags


def embedded(text: str) -> Image.Image:
    content = re.search(r'src="data:image/(\w+);base64,([^"]+)"', text)
    assert content is not None
    image = Image.open(io.BytesIO(base64.b64decode(content[2])))
    assert (image.format or "").lower() == content[1]
    return image


def test_small_pictures_are_embedded_as_they_are_and_large_ones_scaled(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.fromarray(pixels).resize((4000, 1000)).save(tmp_path / "large.png")
    assert (np.asarray(embedded(Report("t").add_figure(tmp_path / "small.png").html())) == pixels).all()
    assert embedded(Report("t").add_figure(tmp_path / "large.png").html()).size == (1600, 400)
    Image.fromarray(pixels).save(tmp_path / "scan.tif")  # browsers do not show TIFF
    assert embedded(Report("t").add_figure(tmp_path / "scan.tif").html()).format == "JPEG"


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = Report("Größe µm").write(tmp_path / "new" / "report.html")
    assert "<title>Größe µm</title>" in path.read_text(encoding="utf-8")
    assert [child.name for child in path.parent.iterdir()] == ["report.html"]


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "report.html").mkdir()
    with pytest.raises((InputError, IsADirectoryError)):
        Report("t").write(tmp_path / "blocked" / "report.html")


def test_the_interval_and_the_spread_stand_in_columns_of_their_own() -> None:
    pooled = {"accuracy": 0.9, "auc": 0.95, "recall/0": 1.0, "kappa": float("nan")}
    intervals = {"auc": Interval(0.9, 0.99), "kappa": Interval(float("nan"), float("nan"), 9)}
    spread = {"auc": Spread(0.94, 0.02, 5), "accuracy": Spread(0.9, float("nan"), 1)}
    rows = metric_rows(pooled, intervals, spread, n=75).to_dict("list")
    assert rows == {
        "Metric": ["AUC", "Accuracy", "Cohen's κ"],
        "All test predictions": ["0.950", "0.900", "–"],
        "95 % interval": ["0.900 – 0.990", "–", "–"],
        "Mean ± SD over folds": ["0.940 ± 0.020", "0.900", "–"],
        "Folds": ["5", "1", "0"],
        "n": ["75", "75", "75"],
    }
    assert list(metric_rows(pooled, names=["recall/0"])["Metric"]) == ["recall/0"]
    assert format_spread(Spread(float("nan"), float("nan"), 0)) == "–"

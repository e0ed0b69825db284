"""Which slides a cohort has, and the table of what became of them."""

import threading
from pathlib import Path

import pytest

from kernels.errors import InputError
from tasks.wsi_mil.cohort import SlideReport, SlidesTable, find_slides


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_slides_of_a_folder_a_file_and_a_list(tmp_path: Path) -> None:
    touch(tmp_path, "b.svs", "sub/007.tif", "notes.txt")
    assert [(s.slide_id, s.path) for s in find_slides(tmp_path)] == [
        ("007", tmp_path / "sub" / "007.tif"),
        ("b", tmp_path / "b.svs"),
    ]
    assert [s.slide_id for s in find_slides(tmp_path / "b.svs")] == ["b"]
    table = tmp_path / "list.csv"
    table.write_text("slide_id,path\n007,b.svs\n")
    assert [(s.slide_id, s.path) for s in find_slides(table)] == [("007", tmp_path / "b.svs")]
    table.write_text("slide\nsub/007.tif\n")
    assert [s.slide_id for s in find_slides(table)] == ["007"]


@pytest.mark.parametrize("names", [("a.svs", "sub/a.tif"), ("a.svs", "sub/A.svs")])
def test_two_files_with_one_id_are_refused_naming_both(tmp_path: Path, names: tuple[str, str]) -> None:
    touch(tmp_path, *names)
    with pytest.raises(InputError, match="is there twice") as caught:
        find_slides(tmp_path)
    assert all(str(tmp_path / name) in str(caught.value) for name in names)


@pytest.mark.parametrize("slide_id", ["../../x", "a/b", "", ".a", "a\tb"])
def test_ids_that_are_no_file_names_are_refused(tmp_path: Path, slide_id: str) -> None:
    (tmp_path / "list.csv").write_text(f'slide_id,path\n"{slide_id}",a.svs\n')
    with pytest.raises(InputError, match="cannot be used as a file name"):
        find_slides(tmp_path / "list.csv")


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.slides=.*none does not exist"):
        find_slides(tmp_path / "none")
    with pytest.raises(InputError, match="holds no slides"):
        find_slides(touch(tmp_path / "x", "a.txt"))
    (tmp_path / "list.csv").write_text("file\na.svs\n")
    with pytest.raises(InputError, match="needs 'path' or 'slide'"):
        find_slides(tmp_path / "list.csv")


def test_the_table_keeps_rows_of_other_slides_and_is_sorted(tmp_path: Path) -> None:
    table = SlidesTable(tmp_path / "slides.csv")
    table.update([SlideReport("b", "/x/b.svs", "done", "", 12, 0.25, 0.5, 0.5, 1.23456789)])
    SlidesTable(tmp_path / "slides.csv").update([SlideReport("a", "/x/a.svs", "failed", 'no "tissue", none')])
    table.update([SlideReport("b", "/x/b.svs", "skipped", "complete", 12)])
    rows = table.rows()
    assert [(r["slide_id"], r["status"], r["reason"]) for r in rows] == [
        ("a", "failed", 'no "tissue", none'),
        ("b", "skipped", "complete"),
    ]
    assert rows[0]["tiles"] == "" and rows[1]["tiles"] == "12"
    assert [p.name for p in tmp_path.iterdir()] == ["slides.csv"]


def test_no_row_is_lost_when_many_write_at_once(tmp_path: Path) -> None:
    def write(name: str) -> None:
        SlidesTable(tmp_path / "slides.csv").update([SlideReport(name, name, "done")])

    threads = [threading.Thread(target=write, args=(f"s{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(SlidesTable(tmp_path / "slides.csv").rows()) == 12

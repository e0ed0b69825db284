"""Atomic writes and ids that are safe as file names."""

import errno
from pathlib import Path

import pytest

from kernels.errors import InputError
from tasks.common.files import atomic_path, explain_os_errors, safe_id


def test_a_finished_block_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "new" / "a.csv") as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("whole")
    assert (tmp_path / "new" / "a.csv").read_text() == "whole"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.csv"]


def test_a_failed_block_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_a_full_or_read_only_disk_is_one_sentence(number: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught, explain_os_errors(tmp_path / "x.h5"):
        raise OSError(number, "…")
    assert "x.h5" in str(caught.value)


def test_a_full_device_is_explained_for_real() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(InputError, match="disk is full"), explain_os_errors("/dev/full"), open("/dev/full", "w") as f:  # noqa: PTH123
        f.write("x" * 100_000)


def test_other_system_errors_pass_through() -> None:
    with pytest.raises(FileNotFoundError), explain_os_errors("x"):
        raise FileNotFoundError(errno.ENOENT, "no such file")


@pytest.mark.parametrize("name", ["007", "TCGA-02-0001.a", "S 4", "Ä1"])
def test_ordinary_ids_pass_unchanged(name: str) -> None:
    assert safe_id(name, "labels.csv row 2") == name


@pytest.mark.parametrize("name", ["", "../../x", "a/b", "a\\b", ".hidden", " x", "a\n", "c:d", "x" * 300])
def test_ids_that_could_leave_the_folder_are_refused_with_their_place(name: str) -> None:
    with pytest.raises(InputError, match=r"labels\.csv row 2"):
        safe_id(name, "labels.csv row 2")

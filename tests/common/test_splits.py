"""Splits of other tools are read as they are meant, and every mistake in one is a sentence with the file's name."""

import json
from pathlib import Path

import pytest

from kernels.errors import InputError
from tasks.common.crossval import Fold, make_folds
from tasks.common.splits import read_splits, write_splits
from tasks.common.tables import find_column, read_table

IDS = ["001", "002", "003", "004", "005"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_written_splits_are_read_again(tmp_path: Path) -> None:
    ids = [f"{i:04}" for i in range(30)]
    folds = make_folds(ids, [i % 3 for i in range(30)], num_folds=3, val_fraction=0.2)
    written = write_splits(folds, tmp_path / "splits")
    assert [path.name for path in written] == ["splits_0.csv", "splits_1.csv", "splits_2.csv"]
    assert written[0].read_text().splitlines()[0] == ",train,val,test"
    assert read_splits(tmp_path / "splits", ids) == folds
    assert read_splits(written[1], ids) == [folds[1]]


def test_folds_of_a_folder_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folds = [Fold(["001"], ["002"], ["003"], k) for k in (10, 2)]
    write_splits(folds, tmp_path)
    write(tmp_path / "splits_2_descriptor.csv", "x\n1\n")
    write(tmp_path / "splits_2_bool.csv", "x\n1\n")
    assert [fold.index for fold in read_splits(tmp_path, IDS)] == [2, 10]


def test_ragged_columns_keep_leading_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "splits_4.csv", ",train,val,test\n0,001,002,003\n1,004,,005\n")
    assert read_splits(path, IDS) == [Fold(["001", "004"], ["002"], ["003", "005"], 4)]


def test_boolean_rows(tmp_path: Path) -> None:
    text = ",train,val,test\n001,True,False,False\n002,False,True,False\n003,False,False,True\n004,False,False,False\n"
    path = write(tmp_path / "splits_1_bool.csv", text)
    assert read_splits(path, IDS) == [Fold(["001"], ["002"], ["003"], 1)]
    assert read_splits(tmp_path, IDS) == [Fold(["001"], ["002"], ["003"], 1)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_split_column_in_any_case_and_dialect(tmp_path: Path, separator: str) -> None:
    rows = ["Case,ID,Label,Split", "p,001,x,Train", "p,002,x,VAL", "q,003,y,test", "q,004,y,validation", "r,005,y,"]
    path = write(tmp_path / "labels.csv", "\ufeff" + "\r\n".join(rows).replace(",", separator))
    assert read_splits(path, IDS) == [Fold(["001"], ["002", "004"], ["003"])]


def test_the_id_column_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "labels.csv", "Slide_ID,split\n001,train\n002,val\n003,test\n")
    assert read_splits(path, IDS, id_column="slide_id") == [Fold(["001"], ["002"], ["003"])]
    with pytest.raises(InputError, match=r"has no column 'id'.*Columns: Slide_ID, split"):
        read_splits(path, IDS)


@pytest.mark.parametrize(
    "content",
    [
        {"train_names": ["001"], "val_names": ["002"], "test_names": ["003"]},
        {"train": ["001"], "val": ["002"], "test": ["003"], "comment": "kept by hand"},
        [{"train": ["001"], "validation": ["002"], "test": ["003"]}],
    ],
)
def test_json_objects_and_lists(tmp_path: Path, content: object) -> None:
    path = write(tmp_path / "split.json", json.dumps(content))
    assert read_splits(path, IDS) == [Fold(["001"], ["002"], ["003"])]


def test_a_json_list_is_numbered(tmp_path: Path) -> None:
    one = {"train": ["001"], "val": ["002"], "test": ["003"]}
    path = write(tmp_path / "split.json", json.dumps([one, one]))
    assert [fold.index for fold in read_splits(path, IDS)] == [0, 1]


def test_a_split_without_validation_passes_only_when_none_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "splits_0.csv", "train,test\n001,003\n002,\n")
    assert read_splits(path, IDS, need_val=False) == [Fold(["001", "002"], [], ["003"])]
    with pytest.raises(InputError, match=r"splits_0\.csv, fold 0: the val set is empty"):
        read_splits(path, IDS)


HEAD = "train,val,test\n"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "a.csv",
            HEAD + "001,002,003\n0O4,,\n",
            r"a\.csv, fold 0: the train set names '0O4', which .* Did you mean '004'",
        ),
        ("a.csv", HEAD + "001,002,001\n", "'001' in both the train and the test set; keep each id in one"),
        ("a.csv", HEAD + "001,002,003\n001,,\n", "the train set lists '001' more than once"),
        ("a.csv", HEAD + ",002,003\n", "the train set is empty"),
        ("a.csv", HEAD + "001,002,\n", "the test set is empty"),
        ("a.csv", "ID,Split\n001,trian\n", r"a\.csv row 2: Split 'trian' is none of train, val and test"),
        ("a.csv", "ID,Label\n001,x\n", r"a\.csv is no split: .* it has ID, Label"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "train,val,train\n", "column 'train' appears twice"),
        ("a.csv", HEAD + "001,002,003,004\n", r"a\.csv row 2 has 4 values for 3 columns"),
        ("a.json", "{", r"a\.json is not valid JSON"),
        ("a.json", "[]", r"a\.json is an empty list"),
        ("a.json", '{"train": ["001"]}', r"a\.json, fold 0: expected an object with lists train, val and test"),
        ("a.json", '["001"]', "expected an object"),
        ("a.json", '{"train": "001", "test": ["002"]}', "'train' must be a list of ids in quotes"),
        ("a.json", '{"train": [1.5], "test": ["002"]}', "'train' must be a list of ids in quotes"),
    ],
)
def test_every_mistake_is_a_sentence_with_the_file(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_splits(write(tmp_path / name, text), IDS)


def test_many_unknown_ids_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    rows = "".join(f"x{i},,\n" for i in range(8))
    path = write(tmp_path / "a.csv", HEAD + "001,002,003\n" + rows)
    with pytest.raises(InputError, match=r"'x0', 'x1', 'x2', 'x3', 'x4', \.\.\. \(8 in all\)"):
        read_splits(path, IDS)


def test_a_missing_file_and_an_empty_folder_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.csv: No such file"):
        read_splits(tmp_path / "nowhere.csv", IDS)
    with pytest.raises(InputError, match=r"cannot read .*nowhere\.json: No such file"):
        read_splits(tmp_path / "nowhere.json", IDS)
    with pytest.raises(InputError, match=r"holds no split; its files must be called splits_0\.csv"):
        read_splits(tmp_path, IDS)


def test_text_that_is_not_utf8_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("train,val,test\nmüller,b,c\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text; save it as 'CSV UTF-8'"):
        read_splits(tmp_path / "a.csv", IDS)


def test_a_table_keeps_text_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'id,note\n007,"a, b"\n\n 1e5 ,NA\nshort\n')
    table = read_table(path)
    assert table.to_dict("list") == {"id": ["007", "1e5", "short"], "note": ["a, b", "NA", ""]}
    assert find_column(table, "NOTE", path) == "note"
    with pytest.raises(InputError, match=r"no column 'nots'. Did you mean 'note'\? .* Choose another with data\.x\."):
        find_column(table, "nots", path, "data.x")

"""The labels table: which slide is whose, and what its label means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kernels.errors import InputError, unknown_name
from tasks.common.files import safe_id
from tasks.common.tables import read_table
from tasks.common.weighted_metrics import Kind
from tasks.wsi_mil.features import BagInfo
from tasks.wsi_mil.targets import infer_kind

log = logging.getLogger(__name__)

_SLIDE_COLUMNS = ("slide_id", "slide", "wsi", "image", "id", "filename")
_PATIENT_COLUMNS = ("patient", "patient_id", "case_id", "case")
_LABEL_COLUMNS = ("label", "target", "class", "isup_grade")
_SPLIT_COLUMNS = ("split", "split_info")
_SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif", ".dcm", ".h5", ".pt")


class LabelTable(NamedTuple):
    """The labels file as read: one row per slide, all text."""

    rows: pd.DataFrame  # columns slide_id, patient, split, and one per label column
    label_columns: list[str]


def read_labels(path: Path, data: Any) -> LabelTable:
    """The labels table with the columns this task needs, every cell as text so that 007 stays 007."""
    if not path.is_file():
        raise InputError(f"data.labels={path} does not exist.")
    rows = read_table(path)
    slide = _column(rows, data.slide_column, _SLIDE_COLUMNS, "data.slide_column", path, required=True)
    patient = _column(rows, data.patient_column, _PATIENT_COLUMNS, "data.patient_column", path)
    split = _column(rows, None, _SPLIT_COLUMNS, "", path)
    wanted = data.label_column
    names = list(wanted) if wanted is not None and not isinstance(wanted, str) else [wanted]
    labels = [_column(rows, name, _LABEL_COLUMNS, "data.label_column", path, required=True) for name in names]
    chosen = pd.DataFrame(index=rows.index)
    assert slide is not None
    chosen["slide_id"] = [_without_suffix(i) for i in rows[slide]]
    chosen["patient"] = rows[patient] if patient else chosen["slide_id"]
    chosen["split"] = rows[split].str.lower() if split else ""
    for name in labels:
        chosen[str(name)] = rows[str(name)]
    for position, identifier in enumerate(chosen["slide_id"]):
        safe_id(identifier, f"{path} row {position + 2}")
    if chosen["slide_id"].duplicated().any():
        twice = sorted(set(chosen.loc[chosen["slide_id"].duplicated(), "slide_id"]))
        raise InputError(f"{path}: slide {some(twice)} stands there more than once; keep one row for each slide.")
    return LabelTable(chosen, [str(name) for name in labels])


def join_features(
    table: LabelTable, bags: dict[str, BagInfo], labels: Path, features: Path, missing: str
) -> LabelTable:
    """Rows that have features and a label; the rest is an error, or left out with ``data.missing=skip``."""
    rows = table.rows
    without_features = [i for i in rows["slide_id"] if i not in bags]
    empty = (rows[table.label_columns] == "").any(axis=1)
    without_label = sorted((set(bags) - set(rows["slide_id"])) | set(rows.loc[empty, "slide_id"]))
    faults = []
    if without_features:
        count = f"{len(without_features)} of {len(rows)}"
        faults.append(f"{labels}: {count} slides have no feature file in {features} ({some(without_features)})")
    if without_label:
        count = f"{len(without_label)} of {len(bags)}"
        faults.append(f"{count} feature files in {features} have no label in {labels} ({some(without_label)})")
    if faults and missing == "error":
        raise InputError(f"{'; '.join(faults)}; add them, or leave these slides out with data.missing=skip.")
    for fault in faults:
        log.warning("left out: %s", fault)
    rows = rows[rows["slide_id"].isin(bags) & ~empty].reset_index(drop=True)
    if rows.empty:
        raise InputError(f"no slide of {labels} has a feature file in {features}; the ids must equal the file names.")
    return LabelTable(rows, table.label_columns)


def encode_labels(table: LabelTable, data: Any) -> tuple[Kind, tuple[str, ...], list[int | tuple[int, ...]]]:
    """Kind of target, classes in order, and the label of each row as class index or 0/1 values."""
    columns = table.label_columns
    if len(columns) > 1:
        for column in columns:
            odd = sorted(set(table.rows[column]) - {"0", "1", "0.0", "1.0"})
            if odd:
                raise InputError(f"label column '{column}' of a multi-label target holds {some(odd)}; use 0 and 1.")
        kind = infer_kind(data.target, columns, len(columns))
        if kind != "multilabel":
            raise InputError(f"data.target={kind} takes one label column and data.label_column names {len(columns)}.")
        values = table.rows[columns].astype(float).astype(int)
        return kind, tuple(columns), [tuple(row) for row in values.itertuples(index=False)]
    texts = list(table.rows[columns[0]])
    found = sorted(set(texts), key=_natural)
    classes = tuple(str(c) for c in data.classes) if data.classes is not None else tuple(found)
    strange = sorted(set(found) - set(classes), key=_natural)
    if strange:
        raise InputError(f"label {some(strange)} is not in data.classes={list(classes)}.")
    kind = infer_kind(data.target, classes, 1)
    if kind == "multilabel":
        raise InputError("data.target=multilabel needs the label columns: data.label_column=[first,second,...].")
    if kind == "binary" and len(classes) != 2:
        raise InputError(f"data.target=binary needs two classes and the labels hold {len(classes)}: {some(classes)}.")
    return kind, classes, [classes.index(text) for text in texts]


def _column(
    rows: pd.DataFrame, wanted: str | None, usual: Sequence[str], option: str, path: Path, required: bool = False
) -> str | None:
    by_lower = {str(column).lower(): str(column) for column in rows.columns}
    if wanted is not None:
        if wanted.lower() not in by_lower:
            raise unknown_name(f"{path}: column", wanted, rows.columns)
        return by_lower[wanted.lower()]
    for name in usual:
        if name in by_lower:
            return by_lower[name]
    if required:
        raise InputError(
            f"{path} has no column {' or '.join(usual)}; it has {', '.join(rows.columns)}: name one with {option}=."
        )
    return None


def _without_suffix(identifier: str) -> str:
    lower = identifier.lower()
    return next((identifier[: -len(s)] for s in _SLIDE_SUFFIXES if lower.endswith(s)), identifier)


def _natural(text: str) -> tuple[int, float, str]:
    """Numbers by value before words by letter, so that grade 10 follows grade 9."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")

"""Cases one after the other, each with a record of its own, so that a run that was stopped does none of them twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from kernels.errors import InputError
from tasks.common.checkpoints import hashed
from tasks.common.files import write_json
from tasks.common.progress import ProgressBars
from tasks.common.segmentation.checkpoint import Segmenter

log = logging.getLogger(__name__)
T = TypeVar("T")


def segment_each(
    names: Sequence[str], folder: Path, segment: Callable[[int, Path], dict[str, Any]], unit: str
) -> tuple[pd.DataFrame, list[str]]:
    """Call ``segment`` for each case that is not done yet, and put what it says into one table.

    Args:
        names: of the cases; each has the folder ``folder/NAME``.
        segment: given a case's number and folder, writes its files and returns a row of the table, in JSON's types.
        unit: what is counted, for the progress bar.

    Returns:
        A row for each case that is done, and a sentence for each that cannot be.
    """
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    records = [folder / name / "result.json" for name in names]
    left = sum(not record.exists() for record in records)
    if left < len(names):
        log.info("%d of %d %s are segmented already", len(names) - left, len(names), unit)
    with ProgressBars() as bars, bars.add("segmenting", total=left, unit=unit, passing=True) as bar:
        for number, record in enumerate(records):
            if not record.exists():
                try:
                    write_json(record, segment(number, record.parent))
                except InputError as error:
                    failures.append(str(error))
                    log.error("%s", error)
                bar.advance(1)
            if record.exists():
                rows.append(json.loads(record.read_text()))
    return pd.DataFrame(rows), failures


def not_trained_on(
    cases: Sequence[T], ids: Sequence[str], segmenter: Segmenter, leave_out: bool, checkpoint: object, unit: str
) -> tuple[list[T], int]:
    """The cases to evaluate on, and how many of them the segmenter was trained or chosen on, with a warning.

    Args:
        leave_out: leave those out that it was trained on (``evaluation.unseen``).
        checkpoint: as the user gave it, for the message.
        unit: what the cases are.

    Raises:
        InputError: none would be left.
    """
    seen = [hashed(case_id) in segmenter.trained_on for case_id in ids]
    if leave_out:
        left = [case for case, known in zip(cases, seen, strict=True) if not known]
        if not left:
            raise InputError(f"all {unit} were used to train checkpoint={checkpoint}; name one fold of it.")
        return left, 0
    if any(seen):
        log.warning(
            "%d of %d %s were used to train this checkpoint (%s ...): the figures are too good for them; "
            "evaluation.unseen=true leaves them out.",
            sum(seen), len(seen), unit, ids[seen.index(True)],
        )  # fmt: skip
    return list(cases), sum(seen)

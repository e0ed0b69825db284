"""A CSV of cases: ``case_id,image[,image2..],label[,patient][,date][,split]``."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.tables import find_column, read_table
from tasks.meningioma.cases import Case
from tasks.meningioma.listing import SIDES, Listing, add, below, patient_of


def list_table(path: Path, settings: DictConfig) -> Listing:
    """The cases of a CSV; paths start from its folder and must stay in it.

    Raises:
        InputError: the file or a column is missing.
    """
    if not path.is_file():
        raise InputError(f"data.path={path} is no file, which data.format=csv needs.")
    table = read_table(path)
    columns = {str(name).lower(): str(name) for name in table.columns}
    first = find_column(table, "image", path)
    more = sorted((int(m[1]), columns[n]) for n in columns if (m := re.fullmatch(r"image_?(\d+)", n)))
    image_columns = [first, *(column for _, column in more)]
    id_column = find_column(table, "case_id", path)
    listing = Listing([], channel_names=tuple(image_columns))
    for number, row in enumerate(table.to_dict("records"), start=2):
        where = f"{path} row {number}"

        def of(name: str, row: dict[Any, Any] = row) -> str:
            return str(row[columns[name]]) if name in columns else ""

        texts = [str(row[column]) for column in image_columns]
        paths, problems = [], []
        for text in [*texts, *([of("label")] if of("label") else [])]:
            file = below(path.parent, text) if text else None
            if not text:
                problems.append(f"{where} has no image; give a path for every image column.")
            elif file is None:
                problems.append(
                    f"{where}: '{text}' lies outside {path.parent or '.'}; paths start from there, without '..'."
                )
            elif not file.exists():
                problems.append(f"{where}: there is no file '{text}' in {path.parent}.")
            else:
                paths.append(file)
        side, day = of("split").lower(), None
        if side and side not in SIDES:
            problems.append(f"{where}: split '{side}' is none of train, val and test.")
        if of("date"):
            try:
                day = date.fromisoformat(of("date"))
            except ValueError:
                problems.append(f"{where}: date '{of('date')}' is not a date; write YYYY-MM-DD.")
        if problems:
            listing.problems.extend(problems)
            continue
        images, label = (paths[:-1], paths[-1]) if of("label") else (paths, None)
        case_id = str(row[id_column])
        patient = of("patient") or patient_of(case_id, settings)
        add(listing, Case(case_id, patient, tuple(images), label, SIDES.get(side), day), where)
    return listing

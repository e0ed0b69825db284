"""Reading a small CSV that a user made, with every value kept as the text it is."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd

from kernels.errors import InputError, nearest_name


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV as a table of strings: leading zeros survive, blanks are empty strings, outer spaces are cut off.

    Commas, semicolons and tabs are told apart by the header; a byte-order mark and ragged rows are accepted.

    Raises:
        InputError: the file is missing, unreadable, empty, not UTF-8, names a column twice, or has a row longer than
            its header.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save it as 'CSV UTF-8'.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from None
    header_line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)
    rows = [[v.strip() for v in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)]
    rows = [row for row in rows if any(row)]
    if not rows:
        raise InputError(f"{path} is empty; it needs a header row and a row for each sample.")
    header = rows[0]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{path}: column '{twice[0]}' appears twice in the header; rename one of the two.")
    for number, row in enumerate(rows[1:], start=2):
        if any(row[len(header) :]):
            raise InputError(
                f"{path} row {number} has {len(row)} values for {len(header)} columns; quote values with commas."
            )
    body = [(row + [""] * len(header))[: len(header)] for row in rows[1:]]
    return pd.DataFrame(body, columns=header, dtype=str)


def find_column(table: pd.DataFrame, name: str, path: str | Path, option: str = "") -> str:
    """The column called ``name``, whatever its case.

    Raises:
        InputError: there is none; the message lists the columns, the nearest name, and ``option`` that chooses another.
    """
    for column in table.columns:
        if column.lower() == name.lower():
            return str(column)
    near = nearest_name(name, table.columns)
    hint = f" Did you mean '{near}'?" if near else ""
    how = f" Choose another with {option}." if option else ""
    raise InputError(f"{path} has no column '{name}'.{hint} Columns: {', '.join(map(str, table.columns))}.{how}")

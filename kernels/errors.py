"""The one exception a user is meant to read, and the sentence for a name nobody knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave is wrong; the message is one sentence saying what, where, and what to do.

    Entry points print the message without a stack trace and end with a non-zero exit code. Any other exception is a
    fault of ours and keeps its trace.
    """


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None when nothing is near."""
    names = {str(k).lower(): str(k) for k in known}
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return names[close[0]] if close else None


def unknown_name(what: str, name: str, known: Iterable[str], how_to_list: str = "") -> InputError:
    """An error that names the unknown value, the nearest known one and how to see the rest.

    >>> str(unknown_name("attention", "acmill", ["abmil", "acmil"]))
    "attention 'acmill' is not known. Did you mean 'acmil'? Known: abmil, acmil."
    """
    names = sorted({str(k) for k in known}, key=str.lower)
    near = nearest_name(name, names)
    hint = f" Did you mean '{near}'?" if near else ""
    shown = ", ".join(names[:24]) + (f", ... ({len(names)} in all)" if len(names) > 24 else "")
    listing = f" {how_to_list}" if how_to_list else ""
    return InputError(f"{what} '{name}' is not known.{hint} Known: {shown}.{listing}")

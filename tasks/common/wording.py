"""Small pieces of sentences that messages share."""

from __future__ import annotations

from collections.abc import Sequence


def quoted(names: Sequence[object], limit: int = 5) -> str:
    """Names in quotes, the first few of many.

    >>> quoted(["a", "b"])
    "'a', 'b'"
    >>> quoted(range(9), limit=2)
    "'0', '1', ... (9 in all)"
    """
    shown = ", ".join(f"'{n}'" for n in names[:limit])
    return shown + (f", ... ({len(names)} in all)" if len(names) > limit else "")

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


def listed(problems: Sequence[str], limit: int = 20) -> str:
    """Sentences as one message, a line each when there are several.

    >>> listed(["a.png is empty."])
    'a.png is empty.'
    """
    if len(problems) == 1:
        return problems[0]
    more = [f"... and {len(problems) - limit} more."] if len(problems) > limit else []
    return "\n  ".join([f"{len(problems)} problems with the data:", *problems[:limit], *more])

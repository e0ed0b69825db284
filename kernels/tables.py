"""Tables that depend on sizes alone: made once, and afresh while a model is exported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Table = TypeVar("_Table")


def made_once(most: int) -> Callable[[Callable[_Arguments, _Table]], Callable[_Arguments, _Table]]:
    """Decorator: keep the last ``most`` results of a function of hashable arguments.

    While a model is exported its tensors have shapes and no numbers; one that was kept would be taken for a real table
    afterwards.
    """

    def decorate(make: Callable[_Arguments, _Table]) -> Callable[_Arguments, _Table]:
        kept = functools.lru_cache(maxsize=most)(make)

        @functools.wraps(make)
        def table(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Table:
            if torch.compiler.is_exporting():
                return make(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        table.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return table

    return decorate

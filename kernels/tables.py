"""Tables that depend on sizes alone: made once, and afresh while a model is compiled or exported."""

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
    afterwards. The compiler follows what makes a table, and warns of what keeps it.
    """

    def decorate(make: Callable[_Arguments, _Table]) -> Callable[_Arguments, _Table]:
        @functools.lru_cache(maxsize=most)
        def kept(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Table:
            with torch.inference_mode(False):  # or what the first call made could not be used while training
                return make(*args, **kwargs)

        @functools.wraps(make)
        def table(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Table:
            if torch.compiler.is_compiling():  # or exporting
                return make(*args, **kwargs)
            return kept(*args, **kwargs)  # type: ignore[arg-type]

        table.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
        return table

    return decorate

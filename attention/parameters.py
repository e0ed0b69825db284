"""What the parameters of a module may be, read from the annotations of its constructor.

A value of another type would fail deep inside a layer, or pass unnoticed: ``"false"`` is true. Ranges that many modules
share are types here; what only one module knows, such as a side that must be odd, it checks itself.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from kernels.errors import InputError, unknown_name


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``, both included."""

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        return f"at least {self.least}" if self.most == math.inf else f"from {self.least} to {self.most}"


Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Probability = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]


def check_parameters(name: str, cls: type, params: Mapping[str, Any]) -> None:
    """Refuse values that the annotations of the constructor of ``cls`` exclude.

    Annotations that say nothing of numbers, strings and their sequences are passed over, and so are those that cannot
    be resolved: a class of the user's may have any.

    Raises:
        InputError: naming the parameter, the value and what it may be.
    """
    try:
        hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    except (NameError, TypeError, AttributeError):
        return
    for parameter, value in params.items():
        if parameter not in hints or _fits(value, hints[parameter]):
            continue
        options = _options(hints[parameter])
        if isinstance(value, str) and options:
            raise unknown_name(f"attention '{name}': {parameter}", value, options)
        raise InputError(f"attention '{name}': {parameter}={value!r} must be {_spoken(hints[parameter])}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is Annotated:
        ranges = [extra for extra in inner[1:] if isinstance(extra, Range)]
        return _fits(value, inner[0]) and all(each.least <= value <= each.most for each in ranges)
    if origin is Literal:
        return any(value is option or (value == option and type(value) is type(option)) for option in inner)
    if origin is Sequence:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, inner[0]) for v in value)
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if hint is str or hint is types.NoneType:
        return isinstance(value, hint)
    return True


def _options(hint: Any) -> list[str]:
    """The strings that are allowed where only some are."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return [option for each in inner for option in _options(each)]
    return [option for option in inner if isinstance(option, str)] if get_origin(hint) is Literal else []


def _spoken(hint: Any, several: bool = False) -> str:
    """``hint`` as it is said, of one value or of several."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _listed(_spoken(option, several) for option in inner)
    if origin is Annotated:
        return ", ".join([*(str(extra) for extra in inner[1:] if isinstance(extra, Range)), _spoken(inner[0], several)])
    if origin is Literal:
        return _listed(repr(option) for option in inner)
    if origin is Sequence:
        return f"a list of {_spoken(inner[0], several=True)}"
    one, many = _WORDS[hint]
    return many if several else one


_WORDS: dict[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    types.NoneType: ("None", "None"),
}


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last

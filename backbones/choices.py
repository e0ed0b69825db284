"""What may be written for ``attention=`` and ``gate=`` of a backbone, and the modules built from it.

A choice is the name of a registered module, a dotted path ``package.module:Class``, a class with an attribute ``kind``,
or a mapping of ``name`` and parameters. A list holds one choice per stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

import attention as registry
from attention.registry import build_in_block, name_of
from kernels.errors import InputError

HostKind = Literal["mixer", "gate"]
HOST_KINDS: tuple[HostKind, ...] = ("mixer", "gate")
_WHERE: dict[HostKind, str] = {
    "mixer": "a token mixer replaces that of transformer blocks",
    "gate": "a gate follows the stages of a convolutional pyramid",
}


@dataclass(frozen=True)
class Choice:
    """One module that is to be built: its name, its class, and the parameters that were given for it."""

    name: str
    cls: type[nn.Module]
    params: dict[str, Any] = field(default_factory=dict)

    def build(self, dim: int, index: int = 0, **offers: Any) -> nn.Module:
        """The module for ``dim`` channels in block ``index`` of a stage.

        ``offers`` (``num_heads``, ``input_size``) are passed where the class takes them and they were not given.

        Raises:
            InputError: a parameter is unknown or impossible.
        """
        return build_in_block(self.cls, self.name, index, dim=dim, offers=offers, params=self.params)


def choose(entry: Any, kinds: Sequence[HostKind] = HOST_KINDS) -> Choice:
    """The choice that ``entry`` stands for, of the first of ``kinds`` in which it exists.

    Raises:
        InputError: the name is unknown, the form is not one of a choice, or the module is of another kind.
    """
    module, params = _module_and_params(entry)
    name = module if isinstance(module, str) else name_of(module)
    found = registry.kinds_of(module)
    kind = next((kind for kind in kinds if kind in found), None)
    if kind is None:
        fitting = "; ".join(f"{_WHERE[kind]} ({', '.join(registry.available(kind))})" for kind in kinds)
        raise InputError(
            f"attention '{name}' is of kind '{' and '.join(found)}', which has no place in this backbone; {fitting}."
        )
    cls = registry.class_of(module, kind)
    if 2 not in getattr(cls, "grids", (2,)):
        raise InputError(f"attention '{name}' takes no maps of two axes, which the stages of a backbone give.")
    return Choice(name, cls, params)


def per_stage(entry: Any, stages: int, kind: HostKind, what: str) -> list[Choice | None]:
    """One choice for each of ``stages``; a single entry counts for all of them, None in a list for no choice.

    Raises:
        InputError: the list has another length, or :func:`choose` refuses an entry.
    """
    if not is_list(entry):
        return [choose(entry, (kind,))] * stages
    if len(entry) != stages:
        want = "one stage, so give one entry" if stages == 1 else f"{stages} stages, so give one entry or {stages}"
        raise InputError(f"{what} has {stages and want}; the list has {len(entry)}: {spoken(entry)}.")
    return [None if item is None else choose(item, (kind,)) for item in entry]


def kinds_of(entry: Any) -> list[HostKind]:
    """Which of mixer and gate ``entry`` can be, all of a list together; a name may exist as both.

    Raises:
        InputError: neither, or the entries of a list have no kind in common.
    """
    entries = [item for item in entry if item is not None] if is_list(entry) else [entry]
    if not entries:
        raise InputError("attention is a list without a single name; give one entry per stage.")
    found = [_host_kinds(item) for item in entries]
    common = [kind for kind in HOST_KINDS if all(kind in kinds for kinds in found)]
    if not common:
        names = ", ".join(f"{spoken(item)} ({' and '.join(k)})" for item, k in zip(entries, found, strict=True))
        raise InputError(f"attention mixes kinds in one list: {names}; give mixers or gates alone.")
    return common


def is_list(entry: Any) -> bool:
    """Whether there is one entry per stage."""
    return isinstance(entry, Sequence) and not isinstance(entry, str)


def spoken(entry: Any) -> str:
    """An entry as it is named in messages."""
    if is_list(entry):
        return "[" + ", ".join("None" if item is None else spoken(item) for item in entry) + "]"
    if isinstance(entry, Mapping):
        return str(entry.get("name", dict(entry)))
    return entry if isinstance(entry, str) else getattr(entry, "name", type(entry).__name__)


def _shown(entry: Any) -> str:
    """What was given, in one line: modules print many."""
    return f"a {type(entry).__name__}" if isinstance(entry, nn.Module) else repr(entry)


def _host_kinds(entry: Any) -> list[HostKind]:
    choose(entry)  # refuses what is neither
    exists = registry.kinds_of(_module_and_params(entry)[0])
    return [kind for kind in HOST_KINDS if kind in exists]


def _module_and_params(entry: Any) -> tuple[str | type[nn.Module], dict[str, Any]]:
    if isinstance(entry, str | type):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str | type):
        return entry["name"], {key: value for key, value in entry.items() if key != "name"}
    raise InputError(
        f"attention={_shown(entry)} is not understood, it names no mixer and no gate; give a name, "
        "package.module:Class, a mapping with 'name', or a list with one of these per stage."
    )

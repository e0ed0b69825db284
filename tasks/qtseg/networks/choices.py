"""What ``+attention=`` of a segmentation network may be, and where it goes: into the backbone or into the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import attention as registry
from backbones.choices import Choice, choose, is_list, spoken
from kernels.errors import InputError

Dims = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Chosen:
    """One of the two is there at most.

    Attributes:
        mixer: for ``attention`` of :func:`backbones.create`.
        gate: for the decoder.
    """

    mixer: Any = None
    gate: Choice | None = None

    def gates(self, dims: Dims) -> list[nn.Module] | None:
        """A gate for each map, of which ``dims`` gives the channels and those of its signal."""
        if self.gate is None:
            return None
        return [self.gate.build(dim, i, signal_dim=signal) for i, (dim, signal) in enumerate(dims)]


def chosen(entry: Mapping[str, Any] | str | None, takes_mixers: Callable[[], bool], takes_gates: bool) -> Chosen:
    """Where the module that was asked for goes.

    A name that exists as mixer and gate is a mixer where the backbone takes one.

    Args:
        entry: ``name`` and parameters, as in ``conf/attention``; ``stages`` has one entry for each stage of the
            backbone: true for the module, false or null for the stage as it is, or another module.
        takes_mixers: whether the backbone has token mixers that can be replaced; asked only where that matters.
        takes_gates: whether the decoder has a place for gates.

    Raises:
        InputError: the name is unknown, of a kind that fits nowhere, or the form is wrong.
    """
    if entry is None:
        return Chosen()
    entry = {"name": entry} if isinstance(entry, str) else dict(entry)
    stages = entry.pop("stages", None)
    kinds = registry.kinds_of(entry["name"]) if "name" in entry else []
    if "mixer" in kinds and (takes_mixers() or "gate" not in kinds or stages is not None):
        if not takes_mixers():
            raise _refused(entry, "is a mixer, and this encoder has no token mixer that can be replaced", takes_gates)
        return Chosen(mixer=_per_stage(entry, stages))
    if "gate" in kinds and takes_gates:
        if stages is not None:
            raise InputError(
                f"attention.stages={stages} is for mixers in a backbone; the gate '{entry['name']}' goes into the "
                "decoder at every level, so leave stages out."
            )
        return Chosen(gate=choose(entry, ("gate",)))
    if not kinds:
        raise InputError(f"attention={spoken(entry)} names no module; give a name, or package.module:Class.")
    raise _refused(entry, f"is of kind '{' and '.join(kinds)}', which has no place in this network", takes_gates)


def _refused(entry: Mapping[str, Any], why: str, takes_gates: bool) -> InputError:
    mixers = ", ".join(registry.available("mixer"))
    gates = ", ".join(
        name for name in registry.available("gate") if 2 in getattr(registry.class_of(name, "gate"), "grids", (2,))
    )
    fits = f"gates go into the decoder ({gates}); " if takes_gates else ""
    return InputError(
        f"attention '{entry['name']}' {why}; {fits}mixers replace those of a backbone that has some, such as "
        f"backbone=metaformer_tiny ({mixers})."
    )


def _per_stage(entry: Mapping[str, Any], stages: Any) -> Any:
    if stages is None:
        return entry
    if not is_list(stages):
        raise InputError(f"attention.stages={stages} must be a list with one entry per stage, such as [false,true].")
    return [None if item in (None, False) else entry if item is True else item for item in stages]

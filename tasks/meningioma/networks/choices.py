"""Attention modules in networks for volumes: which fit, and how they are built for maps of three axes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import attention as registry
from attention.registry import name_of
from backbones.blocks import MixerBlock
from backbones.choices import Choice, HostKind, is_list
from kernels.errors import InputError

AXES = 3
_PLACES: dict[HostKind, str] = {"mixer": "mixers of tokens", "gate": "gates of skip connections"}


def fitting(kind: HostKind) -> list[str]:
    """Registered modules of a kind that take volumes."""
    return [name for name in registry.available(kind) if AXES in _grids(registry.class_of(name, kind))]


def kind_of(entry: Any, kinds: Sequence[HostKind] = ("mixer", "gate")) -> HostKind:
    """The first of ``kinds`` that an entry can be in a network for volumes.

    Raises:
        InputError: it is of another kind, takes no volumes, is unknown, or is no entry.
    """
    module, _ = _module_and_params(entry)
    found = registry.kinds_of(module)
    name = module if isinstance(module, str) else name_of(module)
    fits = [kind for kind in kinds if kind in found and AXES in _grids(registry.class_of(module, kind))]
    if fits:
        return fits[0]
    # A class of the user's is not in the registry's lists; what it says of itself decides.
    suitable = "; ".join(f"{_PLACES[kind]}: {', '.join(fitting(kind))}" for kind in kinds)
    if any(kind in found for kind in kinds):
        raise InputError(f"attention '{name}' takes no volumes; these do: {suitable}.")
    raise InputError(
        f"attention '{name}' is of kind '{' and '.join(found)}', which has no place here; these fit: {suitable}."
    )


def choose(entry: Any, kind: HostKind) -> Choice:
    """The module that ``entry`` stands for: a name, ``package.module:Class``, a class, or a mapping with ``name``.

    Raises:
        InputError: as :func:`kind_of`.
    """
    kind_of(entry, (kind,))
    module, params = _module_and_params(entry)
    return Choice(module if isinstance(module, str) else name_of(module), registry.class_of(module, kind), params)


def per_place(entry: Any, places: int, kind: HostKind, default: Any = None) -> list[Choice | None]:
    """A choice for each of ``places``, from one entry for all of them or from a list.

    A mapping may have ``stages``, a list where true stands for the mapping itself. False and null in a list, and an
    entry of None, stand for ``default``, which is an entry or None.

    Raises:
        InputError: a list has another length, or as :func:`kind_of`.
    """
    own = {key: value for key, value in entry.items() if key != "stages"} if isinstance(entry, Mapping) else entry
    stages = entry.get("stages") if isinstance(entry, Mapping) else None
    chosen = stages if stages is not None else entry if is_list(entry) else [own] * places
    if not is_list(chosen) or len(chosen) != places:
        raise InputError(f"attention is given as {chosen}; one entry, or a list of {places}, is needed here.")
    entries = [default if item in (None, False) else own if item is True else item for item in chosen]
    return [None if item is None else choose(item, kind) for item in entries]


def build_mixer(choice: Choice, dim: int, index: int, head_dim: int, grid: Sequence[int]) -> nn.Module:
    """A mixer for maps (B, D, H, W, dim), with tables for ``grid``, as block ``index`` of a stage.

    Raises:
        InputError: a parameter is impossible, or the module turned out to take no volumes.
    """
    accepted = inspect.signature(choice.cls).parameters
    # How many axes a mixer has is not for its configuration to say, which is written for images.
    params = choice.params | ({"axes": AXES} if "axes" in accepted else {})
    heads = choice.params.get("num_heads") or heads_for(dim, head_dim)
    offers = {"num_heads": heads, "input_size": tuple(grid), "local_axes": AXES}
    mixer = Choice(choice.name, choice.cls, params).build(dim, index, **offers)
    if AXES not in getattr(mixer, "grids", (AXES,)):
        raise InputError(f"attention '{choice.name}' with these parameters takes no volumes: {choice.params}.")
    return mixer


def heads_for(dim: int, head_dim: int) -> int:
    """Heads whose width is as close below ``head_dim`` as the number of channels allows."""
    return dim // max(width for width in range(1, min(dim, head_dim) + 1) if dim % width == 0)


class VolumeMixerBlock(MixerBlock):
    """:class:`backbones.blocks.MixerBlock` for maps (B, D, H, W, C): positions come from a 3 x 3 x 3 convolution.

    Args:
        dim: channels C.
        mixer: (B, D, H, W, C) to the same.
        mlp_ratio: hidden channels of the MLP, over C.
        drop_path: probability that a sample skips a branch while training.
    """

    position: Any

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__(dim, mixer, mlp_ratio=mlp_ratio, position=False, drop_path=drop_path)
        self.position = nn.Conv3d(dim, dim, 3, padding=1, groups=dim)


def coarse_grid(size: Sequence[int], stride: int) -> tuple[int, ...]:
    """Voxels of a map whose voxels are ``stride`` times as long as those of a volume of ``size``."""
    return tuple(math.ceil(side / stride) for side in size)


def _grids(cls: type) -> tuple[int, ...]:
    return getattr(cls, "grids", (AXES,))


def _module_and_params(entry: Any) -> tuple[str | type[nn.Module], dict[str, Any]]:
    if isinstance(entry, str | type):
        return entry, {}
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str | type):
        return entry["name"], {key: value for key, value in entry.items() if key not in ("name", "stages")}
    raise InputError(
        f"attention={entry!r} is not understood; give a name, package.module:Class, or a mapping with 'name'."
    )

"""Weights out of training checkpoints, renamed in part, and with tables of positions of other sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from kernels.errors import InputError

State = dict[str, Tensor]
AGENT_TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias")


def innermost(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a training checkpoint holds by the names that weights have in one, averaged weights first as timm does."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            return innermost(state[key])
    return state


def unwrapped(state: Mapping[str, Any]) -> State:
    """The weights themselves, out of a training checkpoint and without the prefix of data-parallel training."""
    return {key.removeprefix("module."): value for key, value in innermost(state).items() if isinstance(value, Tensor)}


def rename_within(state: State, prefix: str, rename: Callable[[State], State]) -> State:
    """``state`` with ``rename`` applied to what lies under ``prefix``, which it does not see."""
    inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    others = {key: value for key, value in state.items() if not key.startswith(prefix)}
    return others | {prefix + key: value for key, value in rename(inside).items()}


def with_tables_resized(state: State, model: nn.Module) -> State:
    """``state`` with tables of positions that were learned at another size of window or map fitted to the model's."""
    own = model.state_dict()
    fitted = dict(state)
    for key, table in state.items():
        wanted = own[key].shape if key in own else table.shape
        if table.shape == wanted:
            continue
        leaf = key.rpartition(".")[2]
        if leaf == "relative_position_bias_table":
            window = model.get_submodule(key.rpartition(".")[0]).window_size
            fitted[key] = _offsets_resized(table, window)  # type: ignore[arg-type]
        elif leaf in AGENT_TABLES:
            fitted[key] = _stretched(table, wanted)
    return fitted


def _offsets_resized(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table (offsets of a square window, heads) for another window (height, width), bicubically."""
    side = math.isqrt(len(table))
    if side**2 != len(table):
        raise InputError(f"a bias table of {len(table)} offsets is of no square window, and cannot be resized.")
    offsets = table.t().unflatten(1, (side, side))[None].float()
    resized = F.interpolate(offsets, [2 * n - 1 for n in window], mode="bicubic", align_corners=False)
    return resized[0].flatten(1).t().contiguous().to(table.dtype)


def _stretched(table: Tensor, shape: Sequence[int]) -> Tensor:
    """``table`` interpolated linearly along each axis whose length differs."""
    for axis, length in enumerate(shape):
        if table.shape[axis] != length:
            lines = table.movedim(axis, -1)
            resized = F.interpolate(lines.flatten(0, -2)[None].float(), length, mode="linear", align_corners=False)
            table = resized[0].unflatten(0, lines.shape[:-1]).movedim(-1, axis).to(table.dtype)
    return table

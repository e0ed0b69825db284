"""Positions that were learned for one size, for another: embeddings of a grid and tables of relative positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

State = dict[str, Tensor]
# Follow from the sizes and are built, not loaded.
_BUILT = ("relative_position_index", "relative_coords_table", "attn_mask")


def resample(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """``state`` with positions of the sizes that ``model`` has, and without what follows from sizes.

    Embeddings (1, N, C), class tokens among them or not, and (1, H, W, C), and tables ((2h - 1)(2w - 1), heads) and
    (heads, 2h - 1, 2w - 1) are resized bicubically. What cannot be told to be one of these stays as it is.
    """
    own = model.state_dict()
    found: State = {}
    for key, value in state.items():
        if key.endswith(_BUILT) and (key not in own or own[key].shape != value.shape):
            continue
        target = own.get(key)
        if target is not None and target.shape != value.shape and target.ndim == value.ndim:
            value = _resampled(key, value, target, model)
        found[key] = value
    return found


def _resampled(key: str, value: Tensor, target: Tensor, model: nn.Module) -> Tensor:
    leaf = key.rpartition(".")[2]
    if "pos_embed" in leaf and target.ndim == 3 and target.shape[2] == value.shape[2]:
        return _grid(value, target, _grid_of(model, leaf, target.shape[1]))
    if "pos_embed" in leaf and target.ndim == 4 and target.shape[3] == value.shape[3]:
        return _resized(value.permute(0, 3, 1, 2), target.shape[1:3]).permute(0, 2, 3, 1)
    is_table = any(part in leaf for part in ("relative_position_bias_table", "rpb", "rel_pos"))
    if is_table and target.ndim == 3 and target.shape[0] == value.shape[0]:
        return _resized(value[None], target.shape[1:])[0]
    if is_table and target.ndim == 2 and target.shape[1] == value.shape[1]:
        old = _square(value.shape[0])
        new = _table_of(model, key, target.shape[0])
        if old and new:
            return _resized(value.T.unflatten(1, (old, old))[None], new)[0].flatten(1).T.contiguous()
    return value


def _resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(1, C, H, W) to (1, C, *size)."""
    return F.interpolate(maps.float(), tuple(size), mode="bicubic", align_corners=False).to(maps.dtype)


def _grid(value: Tensor, target: Tensor, grid: tuple[int, int] | None) -> Tensor:
    """Embeddings of tokens, of which as many as do not fill the grid stand in front."""
    if grid is None:
        return value
    prefix = target.shape[1] - grid[0] * grid[1]
    if prefix < 0 or not _square(value.shape[1] - prefix):
        return value
    return resample_abs_pos_embed(value, list(grid), num_prefix_tokens=prefix)


def _grid_of(model: nn.Module, leaf: str, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the grid that has as many tokens, or up to a few less: class tokens."""
    embed: Any = getattr(model, "patch_embed", None)
    if isinstance(embed, nn.ModuleList):  # one per branch, as the embeddings are numbered
        number = leaf.rpartition("_")[2]
        embed = embed[int(number)] if number.isdigit() and int(number) < len(embed) else None
    grid = getattr(embed, "grid_size", None)
    if grid is None and embed is not None and hasattr(embed, "img_size") and hasattr(embed, "patch_size"):
        grid = tuple(side // patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True))
    if grid is not None and 0 <= tokens - grid[0] * grid[1] < 16:
        return int(grid[0]), int(grid[1])
    side = math.isqrt(tokens)
    return (side, side) if tokens - side * side in (0, 1, 2) else None


def _table_of(model: nn.Module, key: str, rows: int) -> tuple[int, int] | None:
    """Offsets per axis of a table of a window."""
    window = getattr(model.get_submodule(key.rpartition(".")[0]), "window_size", None)
    if isinstance(window, int):
        window = (window, window)
    if window is not None and (2 * window[0] - 1) * (2 * window[1] - 1) == rows:
        return 2 * window[0] - 1, 2 * window[1] - 1
    side = _square(rows)
    return (side, side) if side else None


def _square(count: int) -> int:
    """The side of a square of ``count`` cells, 0 when there is none."""
    side = math.isqrt(max(count, 0))
    return side if side * side == count else 0

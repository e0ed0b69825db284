"""What networks of several stages have in common, whatever is in them: timm's contract, choices of mixers, weights.

Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models, says what a model of its registry
has to have; :class:`StagedNetwork` has it for every network that is a stem, stages, a norm and a classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.classifier import ClassifierHead
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from attention.mixer import Mixer
from backbones.choices import Choice, per_stage
from kernels.errors import InputError

Size = int | Sequence[int]
State = dict[str, Tensor]

# Learned positions and temperatures: decay would pull them towards no position at all.
_UNDECAYED = ("bias_table", "pos_embed", "cls_token", "temperature", "scale_token")
_AGENT_TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias", "ac_bias", "ca_bias")


class StagedNetwork(nn.Module):
    """Stem, stages at strides 4, 8, 16, 32, norm, classifier: maps (B, C, H, W) all the way.

    Images (B, in_chans, H, W) of any size become logits (B, num_classes); ``forward_features`` gives the last map
    (B, C, H/32, W/32), normalised.

    Args:
        stem: images to maps of stride 4.
        stages: each from the map before it to its own; those with blocks are :class:`backbones.stages.Stage`.
        norm: of the last stage's map.
        dims: channels behind each stage.
        global_pool: ``"avg"``, ``"max"``, or empty for none.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        dims: Sequence[int],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(dims)
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        if num_classes:
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions and temperatures."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none, an empty ``global_pool`` for an unpooled map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the stages ``indices`` (the last n for a number).

        Args:
            norm: normalise the last stage's map as ``forward_features`` does.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(len(self.stages), as_indices(indices))
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            if stop_early and intermediates_only and i > last:
                break
            x = stage(x)
            if i in take:
                maps.append(self.norm(x) if norm and i == len(self.stages) - 1 else x)
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps ``indices`` do not need, in place, and return their numbers."""
        take, last = feature_take_indices(len(self.stages), as_indices(indices))
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class PadToMultiple(nn.Module):
    """Zeros at the bottom and the right of maps (B, C, H, W), up to a multiple of the stride of what follows."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        below, right = (-side % self.multiple for side in x.shape[2:])
        return F.pad(x, (0, right, 0, below)) if below or right else x


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay should leave alone, beside the vectors it leaves alone anyway."""
    return {
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[2] in _AGENT_TABLES or any(part in name for part in _UNDECAYED)
    }


def chosen_mixers(attention: Any, stages: int) -> list[Choice | None]:
    """The mixer chosen for each stage; None where the paper's own stays.

    Raises:
        InputError: the choice is no mixer, or a list has another length.
    """
    return [None] * stages if attention is None else per_stage(attention, stages, "mixer", "this backbone")


class Unmasked(nn.Module):
    """A mixer that knows no masks, in a block that hands one over; it has to be None."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            raise InputError(f"{type(self.mixer).__name__} takes no mask; use a registered mixer for masked maps.")
        return self.mixer(x)


def taking_masks(mixer: nn.Module) -> nn.Module:
    """``mixer`` for a block that calls it with a mask; a class of the user's own need not know of any."""
    return mixer if isinstance(mixer, Mixer) else Unmasked(mixer)


def stage_grids(img_size: Size, strides: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of the maps of an image of ``img_size``, one number or (height, width).

    Raises:
        InputError: it is neither, or not positive.
    """
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"img_size={img_size} must be one number or (height, width), in pixels.")
    return [(-(-sides[0] // stride), -(-sides[1] // stride)) for stride in strides]


def check_stages(name: str, **lists: Sequence[int]) -> None:
    """That the lists have one positive entry per stage each.

    Raises:
        InputError: they have not.
    """
    lengths = {len(entries) for entries in lists.values()}
    if len(lengths) != 1 or 0 in lengths or min(min(entries) for entries in lists.values()) < 1:
        given = ", ".join(f"{key}={list(entries)}" for key, entries in lists.items())
        raise InputError(f"{name}: {given} must have one positive entry for each stage.")


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates that grow evenly from 0 in the first block of all to ``rate`` in the last, by stage."""
    step = rate / max(sum(depths) - 1, 1)
    return [[step * (sum(depths[:i]) + block) for block in range(depth)] for i, depth in enumerate(depths)]


def only_nchw(output_fmt: str) -> None:
    """Refuse every other format of maps."""
    if output_fmt != "NCHW":
        raise InputError(f"output_fmt={output_fmt} is not possible; these maps are NCHW.")


def as_indices(indices: int | Sequence[int] | None) -> int | list[int] | None:
    """What timm takes as a choice of levels."""
    return indices if indices is None or isinstance(indices, int) else list(indices)


# --------------------------------------------------------------------------------------------------------- weights


def unwrapped(state: Mapping[str, Any]) -> State:
    """The weights themselves, out of a training checkpoint and without the prefix of data-parallel training."""
    for key in ("model_ema", "state_dict_ema", "state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            return unwrapped(state[key])
    return {key.removeprefix("module."): value for key, value in state.items()}


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
        elif leaf in _AGENT_TABLES:
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


# ---------------------------------------------------------------------------------------------------- registration


def describe(first_conv: str, licence: str, **others: Any) -> dict[str, Any]:
    """A model's entry in timm's table of weights, of which there are none to download."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head.fc",
        "license": licence,
    } | others


def build(
    cls: type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[..., State],
    own: Mapping[str, Any],
    given: Mapping[str, Any],
) -> nn.Module:
    """The variant with the architecture ``own``, of which ``given`` overrides what it names."""
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**own, **given},
    )

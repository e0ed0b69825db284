"""What networks of several stages have in common, whatever is in them: timm's contract, choices of mixers, weights.

Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models, says what a model of its registry
has to have; :class:`StagedNetwork` has it for every network that is a stem, stages, a norm and a classifier.
"""

from __future__ import annotations

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
from backbones.weights import AGENT_TABLES, State
from kernels.errors import InputError

Size = int | Sequence[int]

# Learned positions and temperatures: decay would pull them towards no position at all.
_UNDECAYED = ("bias_table", "pos_embed", "cls_token", "temperature", "scale_token")


class Classifying(nn.Module):
    """The part of a network that pools its last map (B, C, H, W) and classifies it by ``head``."""

    head: Any
    num_classes: int

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none, an empty ``global_pool`` for an unpooled map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Any:
        return self.forward_head(self.forward_features(x))


class StagedNetwork(Classifying):
    """Stem, stages, norm, classifier: maps (B, C, H, W) all the way.

    Images (B, in_chans, H, W) of any size become logits (B, num_classes); ``forward_features`` gives the last map
    (B, C, ceil(H / stride), ceil(W / stride)), normalised.

    Args:
        stem: images to maps.
        stages: each from the map before it to its own; those with blocks are :class:`backbones.stages.Stage`.
        norm: of the last stage's map.
        dims: channels behind each stage.
        strides: pixels between tokens behind each stage; None for 4, 8, 16, 32.
        levels: the stages whose maps are the pyramid's; None for all.
        level_norms: one for each stage's map as a level of the pyramid, in no way to the next stage or the classifier;
            empty for none.
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
        strides: Sequence[int] | None = None,
        levels: Sequence[int] | None = None,
        level_norms: Sequence[nn.Module] = (),
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.num_features = self.head_hidden_size = dims[-1]
        strides = [4 * 2**i for i in range(len(dims))] if strides is None else strides
        self.levels = list(range(len(dims)) if levels is None else levels)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dims[i], "reduction": strides[i], "module": f"stages.{i}"} for i in self.levels
        ]
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.level_norms = nn.ModuleDict({str(i): level_norm for i, level_norm in enumerate(level_norms)})
        self.norm = norm
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.initialise()

    def initialise(self) -> None:
        """What the weights start from, where the stem and the stages do not bring it."""
        if self.num_classes:
            nn.init.trunc_normal_(self.head.fc.weight, std=0.02)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Tables of positions and temperatures."""
        return undecayed(self)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth."""
        fine = [(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)", (0,)), (r"^(?:level_)?norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def start(self, x: Tensor) -> Tensor:
        """What the first stage is given for images."""
        return self.stem(x)

    def level(self, x: Tensor, stage: int, norm: bool) -> Tensor:
        """The pyramid's map for what comes out of a stage, contiguous; a level's own norm is always applied."""
        if str(stage) in self.level_norms:
            return self.level_norms[str(stage)](x).contiguous()
        return self.norm(x).contiguous() if norm and stage == len(self.stages) - 1 else x

    def finish(self, x: Tensor) -> Tensor:
        """What :meth:`forward_features` gives for what comes out of the last stage."""
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps (B, C, ceil(H / stride), ceil(W / stride)) of the levels ``indices`` (the last n for a number).

        Args:
            norm: normalise the last stage's map as ``forward_features`` does; norms of the levels, where there are any,
                are always and alone what the maps go through.
            stop_early: leave out the stages behind the last one asked for, where only the list is returned.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        wanted = [self.levels[i] for i in take]
        maps = []
        x = self.start(x)
        for i, stage in enumerate(self.stages):
            if stop_early and intermediates_only and i > self.levels[last]:
                break
            x = stage(x)
            if i in wanted:
                maps.append(self.level(x, i, norm))
        return maps if intermediates_only else (self.finish(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        kept = self.levels[last] + 1
        shortened = kept < len(self.stages)
        self.stages, self.levels = self.stages[:kept], self.levels[: last + 1]
        for stage in set(self.level_norms) - {str(self.levels[i]) for i in take}:
            del self.level_norms[stage]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        return self.finish(self.stages(self.start(x)))


def padded(x: Tensor, multiple: int) -> Tensor:
    """``x`` (B, C, H, W) with zeros at the bottom and the right, up to multiples."""
    below, right = (-side % multiple for side in x.shape[2:])
    return F.pad(x, (0, right, 0, below)) if below or right else x


class PadToMultiple(nn.Module):
    """Zeros at the bottom and the right of maps (B, C, H, W), up to a multiple of the stride of what follows."""

    def __init__(self, multiple: int) -> None:
        super().__init__()
        self.multiple = multiple

    def forward(self, x: Tensor) -> Tensor:
        return padded(x, self.multiple)


def undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay should leave alone, beside the vectors it leaves alone anyway."""
    return {
        name
        for name, _ in model.named_parameters()
        if name.rpartition(".")[2] in AGENT_TABLES or any(part in name for part in _UNDECAYED)
    }


def position_tables(model: nn.Module) -> set[str]:
    """Names of the tables of relative positions, which decay would pull towards no position at all."""
    return {name for name, _ in model.named_parameters() if "bias_table" in name or "rpb" in name.rpartition(".")[2]}


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


def heads_of(name: str, dim: int, head_dim: int, choice: Choice) -> int:
    """Heads of a stage; a width that does not divide is of no account where the number of heads is given.

    Raises:
        InputError: the width does not divide, and decides; ``name`` is the network's.
    """
    if dim % head_dim and "num_heads" not in choice.params:
        fitting = ", ".join(str(width) for width in range(1, dim + 1) if dim % width == 0)
        raise InputError(
            f"{name}: {dim} channels are not divisible into heads of head_dim={head_dim}; take head_dim from {fitting}."
        )
    return max(dim // head_dim, 1)


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

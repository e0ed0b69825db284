"""One contract for all backbones that give feature maps: :class:`Pyramid`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from timm.layers.norm import LayerNorm2d
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn
from torch.func import functional_call

from backbones import any_size, freezing
from backbones.any_size import LEAST, Stride
from kernels.errors import InputError

__all__ = ["Pyramid"]

_EPS = 1e-5


class Pyramid(nn.Module):
    """A network as a pyramid of feature maps.

    Images (B, in_chans, H, W), normalised, of any H, W >= 32, become a list of contiguous maps (B, C, rows, columns),
    finest first, with ceil(H / stride) rows and ceil(W / stride) columns. How a network that takes one size, or
    multiples of one, is given any is told family by family in :mod:`backbones.any_size`.

    Args:
        model: a timm model or one that keeps to timm's conventions; what the maps do not need is taken off it.
        out_indices: which maps, counted from the finest, negative from the coarsest, ascending.
        out_strides: instead, their strides; of several maps of one stride the last. 2 is had from a small stem of two
            convolutions on the image where the backbone has no map of that stride.
        level_norms: put a layer norm over channels behind each map, as dense versions of published networks do.
        frozen_stages: -1 for nothing, 0 for the stem, k for it and the first k stages with the norms of their maps:
            these stay in evaluation mode and have no gradients, whatever ``train`` is called with.
        norm_eval: keep every batch norm in evaluation mode.

    Attributes:
        channels, strides: of the maps; strides of CrossViT are no whole numbers.
        size_divisor: images whose sides it divides are not padded before the network.
        mean, std: what images are normalised with, per channel.
        feature_info: timm's description of the maps.
        sizing: what is done for images of other sizes.
        has_level_norms: whether a norm of its own follows each map, which no ImageNet checkpoint has.

    Raises:
        InputError: the model has no such map or stage, or, when called, the image is too small or is none.
    """

    def __init__(
        self,
        model: nn.Module,
        out_indices: int | Sequence[int] | None = None,
        *,
        out_strides: Sequence[int] | None = None,
        level_norms: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        infos = _infos(model)
        made: Any = model
        name = type(model).__name__
        self.in_chans = int(made.in_chans) if isinstance(getattr(model, "in_chans", None), int) else 3
        indices, wants_stem = _chosen(infos, name, out_indices, out_strides)
        any_size.adapt(model)
        own_norms = any(freezing.is_level_norm(f"model.{part}") for part, _ in model.named_modules())
        strides = any_size.strides_of(model, [infos[i]["reduction"] for i in indices], indices)
        self.body = FeatureGetterNet(model, out_indices=tuple(indices))
        self.sizing = any_size.measure(self._run, model, strides, self.in_chans)
        self.size_divisor = self.sizing.divisor
        info: Any = self.body.feature_info
        channels = [int(n) for n in info.channels()]

        sample = next(model.parameters())
        self.level_norms: nn.ModuleDict | None = None
        if level_norms and not own_norms:
            normed = {len(infos) - 1} if isinstance(model, GlobalContextVit) else set()
            self.level_norms = nn.ModuleDict(
                {
                    str(i): LayerNorm2d(width, eps=_EPS)
                    for i, width in zip(indices, channels, strict=True)
                    if i not in normed
                }
            ).to(sample.device, sample.dtype)
        self.has_level_norms = own_norms or self.level_norms is not None
        self.stride2: nn.Module | None = None
        self.feature_info: FeatureInfo = info
        if wants_stem:
            width = max(8 * round(channels[0] / 16), 16)
            self.stride2 = _stem(self.in_chans, width).to(sample.device, sample.dtype)
            entry = {"num_chs": width, "reduction": 2, "module": "stride2"}
            described = [entry, *deepcopy(info.get_dicts())]
            for i, level in enumerate(described):
                level["index"] = i
            self.feature_info = FeatureInfo(described, tuple(range(len(described))))
            channels, strides = [width, *channels], (2, *strides)
        self.indices = tuple(indices)
        self.channels = tuple(channels)
        self.strides: tuple[Stride, ...] = strides
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.mean = _per_channel(cfg.get("mean", (0.485, 0.456, 0.406)), self.in_chans)
        self.std = _per_channel(cfg.get("std", (0.229, 0.224, 0.225)), self.in_chans)
        self.norm_eval = norm_eval
        self._frozen: list[str] = []
        if frozen_stages != -1:
            # timm misnames the stages of Twins.
            levels = [f"body.model.{info['module']}".replace(".block.", ".blocks.") for info in infos]
            image = sample.new_zeros(1, self.in_chans, 64, 64)
            self._frozen = freezing.frozen_names(self, levels[: indices[-1] + 1], image, frozen_stages)
        self.frozen_stages = frozen_stages
        self.train(self.training)

    @property
    def model(self) -> nn.Module:
        """The network itself."""
        return self.body.model

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.ndim != 4 or x.shape[1] != self.in_chans or not x.is_floating_point():
            raise InputError(
                f"images must be floating-point (B, {self.in_chans}, H, W), normalised, not {x.dtype} {tuple(x.shape)}."
            )
        size = x.shape[-2:]
        if min(size) < LEAST:
            raise InputError(
                f"images must be of at least {LEAST} x {LEAST} px, not {size[0]} x {size[1]}; resize or pad them."
            )
        image = self.sizing.prepare(x)
        strides = self.strides if self.stride2 is None else self.strides[1:]
        found = [self.sizing.fit(y, s, image.shape[-2:], size) for y, s in zip(self._run(image), strides, strict=True)]
        if self.level_norms is not None:
            norms = self.level_norms
            found = [norms[str(i)](y) if str(i) in norms else y for i, y in zip(self.indices, found, strict=True)]
        return found if self.stride2 is None else [self.stride2(x), *found]

    def _run(self, image: Tensor) -> list[Tensor]:
        """The network's maps of an image of a size that it takes."""
        own = any_size.positions(self.body.model, image.shape[-2:])
        if not own:
            return self.body(image)
        return functional_call(self.body, {f"model.{name}": value for name, value in own.items()}, (image,))

    def train(self, mode: bool = True) -> Pyramid:
        """Training or evaluation mode, except for what is frozen."""
        super().train(mode)
        if self._frozen:
            freezing.freeze(self, self._frozen)
        if self.norm_eval:
            freezing.norms_in_evaluation(self)
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward pass instead of keeping what is inside it.

        Raises:
            InputError: the network has no such thing.
        """
        try:
            self.model.set_grad_checkpointing(enable)  # type: ignore[operator]
        except (AttributeError, AssertionError, TypeError) as error:
            raise InputError(
                f"{type(self.model).__name__} cannot compute its blocks again in the backward pass; leave gradient "
                "checkpointing out."
            ) from error

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone."""
        own = getattr(self.model, "no_weight_decay", None)
        return {f"body.model.{name}" for name in own()} if own is not None else set()


def _infos(model: nn.Module) -> list[dict[str, Any]]:
    """timm's description of every map of ``model``."""
    infos: Any = getattr(model, "feature_info", None)
    if not infos or not hasattr(model, "forward_intermediates"):
        raise InputError(
            f"{type(model).__name__} gives no feature maps: it has no forward_intermediates and feature_info as timm's "
            "networks have."
        )
    return list(infos) if isinstance(infos, list) else list(infos.info)


def _chosen(
    infos: Sequence[dict[str, Any]],
    name: str,
    out_indices: int | Sequence[int] | None,
    out_strides: Sequence[int] | None,
) -> tuple[list[int], bool]:
    """The indices of the maps, and whether a stem has to supply one of stride 2."""
    levels = [int(info["reduction"]) for info in infos]
    known = ", ".join(f"{i}: {stride}" for i, stride in enumerate(levels)) if len(levels) < 9 else ""
    has = f"{name} has maps 0 to {len(levels) - 1} of strides {', '.join(map(str, dict.fromkeys(levels)))}" + (
        f" ({known})" if known and len(set(levels)) < len(levels) else ""
    )
    if out_strides is not None:
        wanted = list(out_strides)
        if out_indices is not None:
            raise InputError(f"out_indices={out_indices} and out_strides={wanted} say the same; leave one of them out.")
        absent = [stride for stride in wanted if stride not in levels and stride != 2]
        if absent or not wanted or sorted(set(wanted)) != wanted or wanted == [2] != [2, *levels][1:2]:
            raise InputError(f"out_strides={wanted} must be ascending strides of the backbone; {has}.")
        return [max(i for i, level in enumerate(levels) if level == s) for s in wanted if s in levels], (
            2 in wanted and 2 not in levels
        )
    if out_indices is None:
        out_indices = len(levels)
    given = list(range(-out_indices, 0)) if isinstance(out_indices, int) else list(out_indices)
    indices = [i + len(levels) if i < 0 else i for i in given]
    if not indices or sorted(set(indices)) != indices or indices[0] < 0 or indices[-1] >= len(levels):
        raise InputError(f"out_indices={given} must be ascending numbers of the backbone's maps; {has}.")
    return indices, False


def _stem(in_chans: int, width: int) -> nn.Module:
    """Two 3 x 3 convolutions: images (B, in_chans, H, W) to maps (B, width, ceil(H / 2), ceil(W / 2))."""
    return nn.Sequential(
        nn.Conv2d(in_chans, width, 3, stride=2, padding=1),
        LayerNorm2d(width, eps=_EPS),
        nn.GELU(),
        nn.Conv2d(width, width, 3, padding=1),
        LayerNorm2d(width, eps=_EPS),
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number per channel; their mean for images of other channels than the weights were made for."""
    found = tuple(float(value) for value in values)
    return found if len(found) == channels else (sum(found) / len(found),) * channels

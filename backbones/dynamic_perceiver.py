"""Dynamic Perceiver: a convolutional branch for features, a branch of latent tokens for early answers, four exits.

Han, Han, Liu, Wang, Pan, Pu, Deng, Feng, Song, Huang: Dynamic Perceiver for Efficient Visual Recognition, ICCV 2023,
arXiv:2306.11248. The authors' code is under the MIT licence; it names none for its weights.

A learned set of latent tokens reads the map before each of the four convolutional stages by cross attention, thinks by
self attention, is halved in number and widened after each of the first three, and is then written back to every pixel.
Exit 1 answers from the latent of stage 3, exit 2 from that of stage 4 and exit 1's answer, exit 3 is the convolutional
network's own, exit 4 joins the last map, the latent and exit 2's answer. ``forward`` gives exit 4, ``forward_exits``
all four, ``exits`` one after the other as they are computed. Loss and thresholds are in :mod:`backbones.early_exit`.

| name dynperceiver_ | features | tokens | layers of self attention | parameters | ImageNet top-1 (%) of the exits |
|---|---|---|---|---|---|
| reg400m_t32 | RegNetY-400MF | 32 | 3, 3, 9, 3 | 10.0 M | |
| reg400m_t128 | RegNetY-400MF | 128 | 3, 3, 9, 3 | 10.0 M | |
| reg800m_t128 | RegNetY-800MF | 128 | 3, 3, 9, 6 | 21.8 M | 68.62, 78.32, 79.15, 79.86 |
| resnet50_0375_t128 | ResNet-50 of 0.375 the width | 128 | 3, 3, 9, 3 | 20.3 M | 72.93, 77.52, 74.32, 77.70 |
| mobilenetv3_075_t128 | MobileNetV3 large of 0.75 the width | 128 | 3, 3, 9, 9 | 9.3 M | 53.13, 71.65, 71.89, 74.59 |

The accuracies are the authors'; parameters are counted here, the first as the authors' code has it exactly.

Knowing deviations: ``drop_rate`` is the dropout before the last layer of exits 3 and 4 of every variant (published: of
exit 3 with ResNets, of both with MobileNetV3, none with RegNets) and is 0 unless given; nothing is run on construction,
where the released code makes a forward pass that changes the batch statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from backbones.dynamic_branches import create_branch
from backbones.dynamic_layers import Exits, Stage
from backbones.dynamic_names import checkpoint_filter_fn
from backbones.four_stages import as_indices, only_nchw
from kernels.errors import InputError

__all__ = ["DynamicPerceiver", "checkpoint_filter_fn"]


class DynamicPerceiver(nn.Module):
    """Images (B, in_chans, H, W) of any size at least 32 to logits (B, num_classes) of the last exit.

    ``forward_features`` gives (B, num_features, H/32, W/32): the last map, and in every place of it the mean latent of
    the last stage and of the one before it, which is all that exits 1, 2 and 4 look at. The pyramid is the
    convolutional branch's, with the latent written to it.

    Args:
        cnn, cnn_width, cnn_depths: the feature branch; see :func:`backbones.dynamic_branches.create_branch`.
        num_latents: number of latent tokens before stage 1, divisible by 8.
        depths: layers of self attention in each stage.
        num_heads: heads of these layers.
        mlp_ratio: hidden width of their MLPs, in multiples of the tokens' width.
        global_pool: as timm's; empty for none, which needs ``num_classes=0``.

    Raises:
        InputError: sizes do not divide, or lists do not have one entry per stage.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        cnn: str = "regnety_004",
        cnn_width: float = 1.0,
        cnn_depths: Sequence[int] | None = None,
        num_latents: int = 128,
        depths: Sequence[int] = (3, 3, 9, 3),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        branch = create_branch(cnn, in_chans, cnn_width, cnn_depths, drop_path_rate)
        widths = branch.widths
        _check(num_latents, depths, num_heads, widths)
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.grad_checkpointing = False
        self.latent = nn.Parameter(torch.empty(num_latents, widths[0]).normal_(std=0.02).clamp_(-2, 2))
        self.stem = branch.stem
        self.stages: list[Stage] = nn.ModuleList(  # type: ignore[assignment]
            Stage(stage, widths[i], widths[i + 1], num_latents >> i, depths[i], num_heads[i], mlp_ratio, last=i == 3)
            for i, stage in enumerate(branch.stages)
        )
        # Where a stride occurs twice, the deeper map is taken.
        self.levels = [{stride: k for k, stride in enumerate(branch.strides)}[stride] for stride in (4, 8, 16, 32)]
        self.feature_info = [
            {"num_chs": widths[k], "reduction": branch.strides[k], "module": f"stages.{k - 1}" if k else "stem"}
            for k in self.levels
        ]
        self.head_dims = (widths[2], widths[3], widths[4])
        self.head_width = branch.hidden
        self.num_features = self.head_hidden_size = sum(self.head_dims)
        self.head: nn.Module = nn.Identity()
        self._set_head(num_classes, global_pool)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if num_classes and not global_pool:
            raise InputError("dynamic perceiver: global_pool='' leaves nothing to classify; take num_classes=0.")
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        if isinstance(self.head, Exits) and num_classes:
            self.head.reset(num_classes)
        elif num_classes:
            like = self.latent
            head = Exits(self.head_dims, self.head_width, num_classes, self.drop_rate)
            self.head = head.to(device=like.device, dtype=like.dtype).train(self.training)
        else:
            self.head = nn.Identity()
        self.num_classes = num_classes

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The latent tokens and the biases of keys, which stand for positions."""
        return {"latent"} | {name for name, _ in self.named_parameters() if name.endswith("key_bias")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which layer a parameter belongs to, for learning rates that decay with depth; a stage goes as one."""
        blocks: Any = r"^stages\.(\d+)" if coarse else [(r"^stages\.(\d+)", None), (r"^head", (99999,))]
        return {"stem": r"^stem|^latent", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute what is inside each stage again in the backward pass instead of keeping it."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last exit's last layer."""
        return self.head.exit4.fc if isinstance(self.head, Exits) else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers at every exit; 0 classes for none, an empty ``global_pool`` for an unpooled map."""
        self._set_head(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)

    def exits(self, x: Tensor) -> Iterator[Tensor]:
        """Logits (B, num_classes) of the four exits, each computed when it is asked for."""
        head = self._head()
        x, z = self._start(x)
        first = second = fourth = torch.empty(0)
        for i, stage in enumerate(self.stages):
            z = self._run(stage.observe, x, z)
            if i == 2:
                first = head.exit1(z.mean(1))
                yield first
            elif i == 3:
                fourth = z.mean(1)
                second = head.second(fourth, first)
                yield second
            x = self._run(stage.cnn, x)
            if i == 3:
                yield head.exit3(self.global_pool(x))
            x, z = self._run(stage.exchange, x, z)
        yield head.last(self.global_pool(x), fourth, second)

    def forward_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, num_classes) of the four exits, the last of them as :meth:`forward` gives it."""
        return tuple(self.exits(x))

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
            norm: of no account, there is no norm behind the stages.
            stop_early: leave out the stages behind the last one asked for.
            intermediates_only: return the list alone, not (``forward_features`` of ``x``, list).

        Raises:
            InputError: another format than NCHW is asked for.
        """
        only_nchw(output_fmt)
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        x, z = self._start(x)
        maps, means = [x], []
        for k, stage in enumerate(self.stages):
            if stop_early and intermediates_only and k >= self.levels[last]:
                break
            z = self._run(stage.observe, x, z)
            means.append(z.mean(1))
            x, z = self._run(stage.exchange, self._run(stage.cnn, x), z)
            maps.append(x)
        found = [maps[self.levels[i]] for i in take]
        return found if intermediates_only else (_join(x, means), found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the levels ``indices`` do not need, in place, and return the levels' numbers."""
        take, last = feature_take_indices(len(self.levels), as_indices(indices))
        kept = self.levels[last]
        shortened = kept < len(self.stages)
        self.stages = self.stages[:kept]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        x, z = self._start(x)
        means = []
        for stage in self.stages:
            z = self._run(stage.observe, x, z)
            means.append(z.mean(1))
            x, z = self._run(stage.exchange, self._run(stage.cnn, x), z)
        return _join(x, means)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _start(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.stem(x), self.latent.expand(len(x), -1, -1)

    def _run(self, part: Callable[..., Any], *inputs: Tensor) -> Any:
        return checkpoint(part, *inputs) if self.grad_checkpointing else part(*inputs)

    def _head(self) -> Exits:
        if not isinstance(self.head, Exits):
            raise InputError("dynamic perceiver: there are no exits with num_classes=0; call reset_classifier first.")
        return self.head


def _join(x: Tensor, means: Sequence[Tensor]) -> Tensor:
    """The map with the mean latents (B, C) of the last two stages in every place: (B, num_features, H, W)."""
    latents = [mean[:, :, None, None].expand(-1, -1, *x.shape[2:]).to(x.dtype) for mean in means[:-3:-1]]
    return torch.cat((x, *latents), dim=1)


def _check(latents: int, depths: Sequence[int], heads: Sequence[int], widths: Sequence[int]) -> None:
    if latents < 8 or latents % 8:
        raise InputError(f"dynamic perceiver: num_latents={latents} is halved three times; take a multiple of 8.")
    if len(depths) != 4 or len(heads) != 4 or min(*depths, *heads) < 1:
        raise InputError(f"dynamic perceiver: depths={depths} and num_heads={heads} need one positive entry per stage.")
    unfit = [(width, count) for width, count in zip(widths[:4], heads, strict=True) if width % count]
    if unfit or widths[-1] < 8:
        raise InputError(
            f"dynamic perceiver: num_heads={list(heads)} must divide the latent tokens' widths {list(widths[:4])}."
        )


# ------------------------------------------------------------------------------------------------------ entry points


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        # Every layer that the number of classes enters, the earlier answers' way into later ones included.
        "classifier": (
            "head.exit4.fc",
            "head.exit1",
            "head.exit2",
            "head.exit3.fc",
            "head.recycle1.fc",
            "head.recycle2.fc",
        ),
        "license": "mit",
        "paper_ids": "arXiv:2306.11248",
        "origin_url": "https://github.com/LeapLabTHU/Dynamic_Perceiver",
    }


default_cfgs = generate_default_cfgs(
    {
        f"dynperceiver_{name}": _cfg()
        for name in ("reg400m_t32", "reg400m_t128", "reg800m_t128", "resnet50_0375_t128", "mobilenetv3_075_t128")
    }
)


def _build(variant: str, pretrained: bool, own: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    return build_model_with_cfg(
        DynamicPerceiver,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **own | given,
    )


@register_model
def dynperceiver_reg400m_t32(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RegNetY-400MF and 32 latent tokens."""
    return _build("dynperceiver_reg400m_t32", pretrained, {"cnn": "regnety_004", "num_latents": 32}, kwargs)


@register_model
def dynperceiver_reg400m_t128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RegNetY-400MF and 128 latent tokens."""
    return _build("dynperceiver_reg400m_t128", pretrained, {"cnn": "regnety_004"}, kwargs)


@register_model
def dynperceiver_reg800m_t128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RegNetY-800MF and 128 latent tokens."""
    return _build("dynperceiver_reg800m_t128", pretrained, {"cnn": "regnety_008", "depths": (3, 3, 9, 6)}, kwargs)


@register_model
def dynperceiver_resnet50_0375_t128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 of 0.375 the width and 128 latent tokens."""
    return _build("dynperceiver_resnet50_0375_t128", pretrained, {"cnn": "resnet50", "cnn_width": 0.375}, kwargs)


@register_model
def dynperceiver_mobilenetv3_075_t128(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV3 large of 0.75 the width and 128 latent tokens."""
    own = {"cnn": "mobilenetv3_large", "cnn_width": 0.75, "depths": (3, 3, 9, 9)}
    return _build("dynperceiver_mobilenetv3_075_t128", pretrained, own, kwargs)

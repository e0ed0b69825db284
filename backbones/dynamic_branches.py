"""Convolutional networks cut into a stem and four stages, for a second branch to listen and speak between them.

The blocks are timm's; only what a width multiplier needs that timm's own networks round differently is put together
here. RegNetY: Radosavovic et al., CVPR 2020, arXiv:2003.13678. ResNet: He et al., CVPR 2016, arXiv:1512.03385.
MobileNetV3: Howard et al., ICCV 2019, arXiv:1905.02244, whose stages are cut where Dynamic Perceiver cuts them: the
stem ends at stride 4, and the third stage ends at stride 32 with the first block of the network's last resolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers.helpers import make_divisible
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models.regnet import RegNet, model_cfgs
from timm.models.resnet import BasicBlock, Bottleneck, make_blocks
from torch import nn

from kernels.errors import InputError, unknown_name

RESNETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
REGNETS = tuple(name for name in model_cfgs if name.startswith("regnety_") and len(name) == len("regnety_000"))
MOBILENETS = ("mobilenetv3_large",)


@dataclass
class Branch:
    """A network without its classifier, cut into parts.

    Attributes:
        stem, stages: the parts, images (B, in_chans, H, W) to maps (B, C, ceil(H / stride), ceil(W / stride)).
        widths, strides: channels and stride behind the stem and behind each of the four stages.
        hidden: width of the hidden layer that the network's own classifier has, 0 for none.
    """

    stem: nn.Module
    stages: list[nn.Module]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    hidden: int = 0


def create_branch(
    name: str,
    in_chans: int = 3,
    width: float = 1.0,
    depths: Sequence[int] | None = None,
    drop_path_rate: float = 0.0,
) -> Branch:
    """The network called ``name``, cut.

    Args:
        name: one of :data:`REGNETS`, :data:`RESNETS` and :data:`MOBILENETS`.
        width: multiplies the channels of a ResNet or MobileNetV3.
        depths: blocks of each stage of a ResNet, where they are not its own.

    Raises:
        InputError: the name is not known, or width or depths are given for a network that has them fixed.
    """
    known = (*REGNETS, *RESNETS, *MOBILENETS)
    if name not in known:
        raise unknown_name("feature branch", name, known)
    if (depths is not None and name not in RESNETS) or (width != 1.0 and name in REGNETS):
        raise InputError(
            f"feature branch '{name}': width={width} and depths={depths} cannot be chosen; width can for ResNets and "
            "MobileNetV3, depths can for ResNets."
        )
    if name in REGNETS:
        return _regnet(name, in_chans, drop_path_rate)
    if name in RESNETS:
        return _resnet(name, in_chans, width, depths, drop_path_rate)
    return _mobilenet(in_chans, width, drop_path_rate)


def _regnet(name: str, in_chans: int, drop_path_rate: float) -> Branch:
    # Widths are rounded to groups as torchvision does, whose networks the published ones are built on.
    network = RegNet(
        model_cfgs[name], in_chans=in_chans, num_classes=0, drop_path_rate=drop_path_rate, group_min_ratio=0.9
    )
    info = network.feature_info
    return Branch(
        network.stem,
        [network.get_submodule(f"s{i}") for i in range(1, 5)],
        tuple(int(str(part["num_chs"])) for part in info),
        tuple(int(str(part["reduction"])) for part in info),
    )


def _resnet(name: str, in_chans: int, width: float, depths: Sequence[int] | None, drop_path_rate: float) -> Branch:
    block, own_depths = RESNETS[name]
    depths = own_depths if depths is None else tuple(depths)
    channels = tuple(int(width * c) for c in (64, 128, 256, 512))
    if len(depths) != 4 or min(depths) < 1 or min(channels) < 1:
        raise InputError(f"feature branch '{name}': width={width} and depths={depths} leave a stage empty.")
    stem = OrderedDict(
        conv=nn.Conv2d(in_chans, channels[0], 7, stride=2, padding=3, bias=False),
        bn=nn.BatchNorm2d(channels[0]),
        act=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    stages, info = make_blocks(
        (block,) * 4,  # type: ignore[arg-type]
        channels,
        depths,
        channels[0],
        drop_path_rate=drop_path_rate,
        act_layer=nn.ReLU,
        norm_layer=nn.BatchNorm2d,
    )
    branch = Branch(
        nn.Sequential(stem),
        [stage for _, stage in stages],
        (channels[0], *(part["num_chs"] for part in info)),
        (4, 4, 8, 16, 32),
    )
    for part in (branch.stem, *branch.stages):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()
    return branch


# Blocks of MobileNetV3 large behind the stem's: kernel, hidden channels, output channels, squeeze-excitation, hard
# swish, stride; one list per stage.
_MOBILE_STEM = ((3, 64, 24, False, False, 2),)
_MOBILE_STAGES = (
    ((3, 72, 24, False, False, 1), (5, 72, 40, True, False, 2)),
    ((5, 120, 40, True, False, 1), (5, 120, 40, True, False, 1), (3, 240, 80, False, True, 2)),
    (
        (3, 200, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 184, 80, False, True, 1),
        (3, 480, 112, True, True, 1),
        (3, 672, 112, True, True, 1),
        (5, 672, 160, True, True, 2),
    ),
    ((5, 960, 160, True, True, 1), (5, 960, 160, True, True, 1)),
)


def _mobilenet(in_chans: int, width: float, drop_path_rate: float) -> Branch:
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
    squeeze = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU, rd_round_fn=make_divisible)
    count = sum(map(len, _MOBILE_STAGES)) + len(_MOBILE_STEM)
    done = 0

    def wide(channels: int) -> int:
        return make_divisible(channels * width, 8)

    def blocks(inputs: int, settings: Sequence[tuple[int, int, int, bool, bool, int]]) -> list[nn.Module]:
        nonlocal done
        made: list[nn.Module] = []
        for kernel, hidden, outputs, squeezes, swishes, stride in settings:
            done += 1
            block = InvertedResidual(
                inputs,
                wide(outputs),
                dw_kernel_size=kernel,
                stride=stride,
                # The hidden width is scaled and rounded by itself, not with the input's.
                exp_ratio=wide(hidden) / inputs,
                act_layer=nn.Hardswish if swishes else nn.ReLU,
                norm_layer=norm,
                se_layer=squeeze if squeezes else None,  # type: ignore[arg-type]
                drop_path_rate=drop_path_rate * done / count,
            )
            made.append(block)
            inputs = wide(outputs)
        return made

    first, last = wide(16), wide(160)
    stem = OrderedDict(
        conv=nn.Conv2d(in_chans, first, 3, stride=2, padding=1, bias=False),
        bn=norm(first),
        act=nn.Hardswish(),
        block1=DepthwiseSeparableConv(first, first, norm_layer=norm),
        block2=blocks(first, _MOBILE_STEM)[0],
    )
    widths, stages = [wide(24)], []
    for settings in _MOBILE_STAGES:
        stages.append(blocks(widths[-1], settings))
        widths.append(wide(settings[-1][2]))
    stages[-1].append(ConvBnAct(last, 6 * last, 1, norm_layer=norm, act_layer=nn.Hardswish))
    widths[-1] = 6 * last
    branch = Branch(
        nn.Sequential(stem),
        [nn.Sequential(*stage) for stage in stages],
        tuple(widths),
        (4, 8, 16, 32, 32),
        hidden=wide(1280),
    )
    for part in (branch.stem, *branch.stages):
        for module in part.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return branch

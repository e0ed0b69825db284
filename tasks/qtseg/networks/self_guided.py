"""Self-guided attention at several scales: two steps of position and channel attention, led by an auto-encoder.

Source: Sinha and Dolz, Multi-scale self-guided attention for medical image segmentation, IEEE Journal of Biomedical and
Health Informatics 2020, arXiv 1906.02849. The attention of places and of channels is that of DANet
(:mod:`attention.dual_position_channel`): no matrix of places by places is kept, where the released code keeps eight.
Released checkpoints hold layers that its forward pass never uses; they are left out. The encoder may be any backbone;
the published one is ResNeXt-101 32x8d with a first convolution of one channel.

At inference the mean of the last step's four predictions is taken before it is resized, which is the same, and the
first step's predictions, which only train, are not made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.dual_position_channel import ChannelAttention, PositionAttention
from tasks.qtseg.networks.levels import nearest_levels
from tasks.qtseg.networks.units import Unit

STRIDES = (4, 8, 16, 32)


class MultiConv(nn.Module):
    """Convolutions of 3, 3 and 1 cells, normalised: (B, inputs, H, W) to (B, outputs, H, W).

    Args:
        shares: end in a softmax over channels instead of a PReLU.
    """

    def __init__(self, inputs: int, outputs: int, shares: bool = False) -> None:
        super().__init__()
        last = nn.Softmax(dim=1) if shares else nn.PReLU()
        self.units = nn.Sequential(
            Unit(inputs, outputs, 3, nn.PReLU()), Unit(outputs, outputs, 3, nn.PReLU()), Unit(outputs, outputs, 1, last)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.units(x)


class AttentionLayer(nn.Module):
    """An attention of half the channels between two convolutions: (B, 2C, H, W) to (B, C, H, W)."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.first = Unit(2 * width, width, 3, nn.PReLU())
        self.attention = attention
        self.last = Unit(width, width, 3, nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.attention(self.first(x)))


class SemanticAutoencoder(nn.Module):
    """Codes and reconstructions of maps (B, C, H, W) of at least 4 x 4 cells; the codes have 4C channels.

    The decoded map is resized to that between the two poolings, and the reconstruction to the input, where sides that
    are no multiple of 4 make that necessary.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Sequential(Unit(dim, 2 * dim), Unit(2 * dim, 2 * dim)),
                nn.Sequential(Unit(2 * dim, 4 * dim), Unit(4 * dim, 4 * dim)),
            ]
        )
        self.up = nn.ModuleList(
            [
                nn.Sequential(
                    Unit(4 * dim, 2 * dim), Unit(2 * dim, 2 * dim), nn.ConvTranspose2d(2 * dim, 2 * dim, 2, 2)
                ),
                nn.Sequential(Unit(2 * dim, dim), Unit(dim, dim), nn.ConvTranspose2d(dim, dim, 2, 2)),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code (B, 4C, H // 4, W // 4) and the reconstruction (B, C, H, W)."""
        half = F.max_pool2d(self.down[0](x), 2)
        code = F.max_pool2d(self.down[1](half), 2)
        decoded = upsampled(self.up[0](code), half.shape[2:])
        return code, upsampled(self.up[1](decoded), x.shape[2:])


class AttentionStep(nn.Module):
    """One step of attention on all four scales; the auto-encoder is shared by them."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        scales = range(len(STRIDES))
        self.semantic = SemanticAutoencoder(2 * width)
        self.position = nn.ModuleList(AttentionLayer(width, PositionAttention(width)) for _ in scales)
        self.channel = nn.ModuleList(AttentionLayer(width, ChannelAttention()) for _ in scales)
        self.guide = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in scales)
        self.project = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in scales)
        self.predict = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for _ in scales)

    def forward(self, scale: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attended features (B, C, H, W), code and reconstruction of one scale's map (B, 2C, H, W)."""
        code, rebuilt = self.semantic(x)
        both = self.channel[scale](x) + self.position[scale](x)
        return self.project[scale](both * self.guide[scale](rebuilt)), code, rebuilt


@dataclass
class Trace:
    """What the network makes of a batch, finest scale first in every list.

    Attributes:
        given: maps (B, C, h, w) of the encoder, projected and resized to stride 4.
        seen: for each step the maps (B, 2C, h, w) that its auto-encoder is given.
        codes, rebuilt, attended: for each step what comes out.
    """

    given: list[Tensor]
    seen: tuple[list[Tensor], list[Tensor]]
    codes: tuple[list[Tensor], list[Tensor]]
    rebuilt: tuple[list[Tensor], list[Tensor]]
    attended: tuple[list[Tensor], list[Tensor]]


class SelfGuided(nn.Module):
    """Images (B, C, H, W) to logits (B, K, H, W), for any H, W that the encoder takes.

    Args:
        encoder: gives a list of maps for an image, and has ``channels`` and ``strides``; maps of strides 4 to 32 are
            used, or those nearest.
        num_classes: K, with the background.
        width: channels of everything behind the encoder.
        gates: one for each scale, finest first, on the projected maps.
        guided_weight: of the difference between the two steps' codes in the loss.
        rebuilt_weight: of the auto-encoders' errors in the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int = 2,
        width: int = 64,
        gates: Sequence[nn.Module] | None = None,
        guided_weight: float = 0.25,
        rebuilt_weight: float = 0.1,
    ) -> None:
        super().__init__()
        made: Any = encoder
        self.num_classes, self.guided_weight, self.rebuilt_weight = num_classes, guided_weight, rebuilt_weight
        self.sources = nearest_levels(made.strides, STRIDES)
        self.down = nn.ModuleList(Unit(made.channels[i], width, 1, nn.PReLU()) for i in self.sources)
        self.gates = None if gates is None else nn.ModuleList(gates)
        self.fuse = MultiConv(4 * width, width)
        self.steps = nn.ModuleList(AttentionStep(width, num_classes) for _ in range(2))
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W): the mean of the last step's predictions."""
        attended = self.trace(x).attended[1]
        found = [predict(y) for predict, y in zip(self.steps[1].predict, attended, strict=True)]  # type: ignore[arg-type]
        return upsampled(torch.stack(found).mean(0), x.shape[2:])

    def forward_training(self, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Predictions that are all to be trained alike, and what is to be added to their losses.

        Returns:
            Eight logits (B, K, H, W), those of the last step first, from the finest scale to the coarsest; and the
            weighted auxiliary losses ``guided`` and ``rebuilt``, scalars.
        """
        trace = self.trace(x)
        levels = [upsampled(y, x.shape[2:]) for y in self.predictions(trace)]
        guided = sum((F.mse_loss(*pair) for pair in zip(*trace.codes, strict=True)), start=x.new_zeros(()))
        rebuilt = x.new_zeros(())
        for seen, made in zip(trace.seen, trace.rebuilt, strict=True):
            for original, copy in zip(seen, made, strict=True):
                rebuilt = rebuilt + F.mse_loss(original, copy)
        return levels, {"guided": self.guided_weight * guided, "rebuilt": self.rebuilt_weight * rebuilt}

    def predictions(self, trace: Trace) -> list[Tensor]:
        """Logits (B, K, h, w) at stride 4, of the last step and then of the first, each from fine to coarse."""
        first, last = self.steps
        pairs = [*zip(last.predict, trace.attended[1], strict=True), *zip(first.predict, trace.given, strict=True)]  # type: ignore[arg-type]
        return [predict(y) for predict, y in pairs]

    def trace(self, x: Tensor) -> Trace:
        """Everything that predictions and losses are made of."""
        maps = self.encoder(x)
        size = [-(-n // STRIDES[0]) for n in x.shape[2:]]
        given = [upsampled(down(maps[i]), size) for i, down in zip(self.sources, self.down, strict=True)]
        if self.gates is not None:
            given = [gate(y) for gate, y in zip(self.gates, given, strict=True)]
        fused = self.fuse(torch.cat(given[::-1], 1))
        trace = Trace(given, ([], []), ([], []), ([], []), ([], []))
        for k, own in enumerate(given):
            beside = fused
            for i, step in enumerate(self.steps):
                seen = torch.cat([own, beside], 1)
                attended, code, rebuilt = step(k, seen)
                trace.seen[i].append(seen)
                trace.codes[i].append(code)
                trace.rebuilt[i].append(rebuilt)
                trace.attended[i].append(attended)
                beside = attended * fused
        return trace

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The released names as ours, without the layers that are never used; ours pass through unchanged."""
        plain = {key.removeprefix("module."): value for key, value in state.items()}
        if "fuse1.fuse_attn.0.weight" not in plain:
            return plain
        renamed = {_renamed(key): value for key, value in plain.items() if not _UNUSED.match(key)}
        for prefix in {key.rpartition("query_conv.")[0] for key in renamed if "query_conv." in key}:
            inside = {key: renamed.pop(key) for key in list(renamed) if key.startswith(prefix)}
            ours = PositionAttention.checkpoint_filter({key.removeprefix(prefix): v for key, v in inside.items()})
            renamed |= {prefix + key: value for key, value in ours.items()}
        return renamed


def upsampled(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, H, W) at ``size``, bilinearly; as it is where it has that size."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, list(size), mode="bilinear", align_corners=False)


_UNUSED = re.compile(r"(conv6_|conv7_|attention\d\.|refine\d\.)")
_UNIT = ("conv", "norm", "act")


def _renamed(key: str) -> str:
    for official, ours in _NAMES:
        found = re.match(official, key)
        if found:
            return ours(*found.groups()) + key[found.end() :]
    return key


def _attention(kind: str, step: str, scale: str, place: str) -> str:
    """The released scales count from the coarsest."""
    layer, number = f"steps.{int(step) - 1}.{kind}.{int(scale) - 1}", int(place)
    if number == 3:
        return f"{layer}.attention."
    return f"{layer}.{'first' if number < 3 else 'last'}.{_UNIT[number % 4]}."


def _semantic(step: str, way: str, depth: str, place: str) -> str:
    """Encoders count from the input, decoders towards it."""
    part = f"down.{int(depth) - 1}" if way == "enc" else f"up.{2 - int(depth)}"
    number = int(place)
    inside = "2." if number == 6 else f"{number // 3}.{_UNIT[number % 3]}."
    return f"steps.{int(step) - 1}.semantic.{part}.{inside}"


_NAMES: tuple[tuple[str, Any], ...] = (
    (r"resnext\.layer0\.0\.", lambda: "encoder.body.model.conv1."),
    (r"resnext\.layer0\.1\.", lambda: "encoder.body.model.bn1."),
    (r"resnext\.layer1\.1\.", lambda: "encoder.body.model.layer1."),  # the pooling in front of it comes first there
    (r"resnext\.", lambda: "encoder.body.model."),
    (r"down(\d)\.(\d)\.", lambda scale, place: f"down.{int(scale) - 1}.{_UNIT[int(place)]}."),
    (r"fuse1\.fuse_attn\.(\d)\.", lambda place: f"fuse.units.{int(place) // 3}.{_UNIT[int(place) % 3]}."),
    (r"pam_attention_(\d)_(\d)\.attn\.(\d)\.", lambda *of: _attention("position", *of)),
    (r"cam_attention_(\d)_(\d)\.attn\.(\d)\.", lambda *of: _attention("channel", *of)),
    (r"semanticModule_(\d)_1\.(enc|dec)(\d)\.(?:en|de)code\.(\d)\.", lambda *of: _semantic(*of)),
    (r"conv_sem_(\d)_(\d)\.", lambda step, scale: f"steps.{int(step) - 1}.guide.{4 - int(scale)}."),
    (r"conv8_(1?)([1-4])\.", lambda second, scale: f"steps.{1 if second else 0}.project.{4 - int(scale)}."),
    (r"predict(\d)(_2)?\.", lambda scale, second: f"steps.{1 if second else 0}.predict.{int(scale) - 1}."),
)

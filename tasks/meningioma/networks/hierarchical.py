"""A U-shaped network for volumes whose encoder is a hierarchy of token mixers, chosen by name.

The encoder's stages are those of this toolkit's ``metaformer`` (Yu et al., MetaFormer Is Actually What You Need for
Vision, CVPR 2022, arXiv 2111.11418) with maps of three axes: positions by a depthwise 3 x 3 x 3 convolution, then a
mixer and an MLP, each in a residual branch. In front are convolutions at the full and at half the resolution, where
mixers of tokens would cost too much and boundaries are decided; behind is the decoder of AGUNet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last
from attention.parameters import NotNegative, Positive, Probability
from backbones.four_stages import check_stages, drop_path_rates
from backbones.stages import Stage
from kernels.errors import InputError
from tasks.meningioma.networks.agunet import skip_gates
from tasks.meningioma.networks.choices import VolumeMixerBlock, build_mixer, coarse_grid, per_place
from tasks.meningioma.networks.decoder import Decoder, DecoderLevel
from tasks.meningioma.networks.encoder import EncoderLevel
from tasks.meningioma.networks.volume import DEFAULT_SIZE, VolumeNetwork

DEFAULT_MIXERS: tuple[dict[str, Any], ...] = (
    {"name": "neighborhood", "kernel_size": 5},
    {"name": "softmax"},
)
"""Windows of 5 x 5 x 5 in the first stage, where voxels are many; attention to all of them from the second."""


class Hierarchical(VolumeNetwork):
    """Convolutions, stages of token mixers and AGUNet's decoder: volumes (B, C, D, H, W) to logits (B, K, D, H, W).

    Every map is half as large as the one before it, along each axis.

    Args:
        in_channels: channels C of the volume.
        classes: K, background included.
        filters: channels of the convolutional levels, the full resolution first.
        dims: channels of the stages of mixers.
        depths: blocks of each stage.
        mixer: a mixer by name, with parameters, or one for each stage, where None is the default: windows in the first
            stage, attention between all voxels of the map from the second.
        gate: a gate on each skip; see :class:`tasks.meningioma.networks.agunet.AGUNet`.
        deep_supervision: whether every level of the decoder has logits, which :meth:`forward_levels` gives.
        head_dim: channels per head, at most.
        mlp_ratio: hidden channels of the MLPs, over the stage's.
        drop_path: probability that a sample skips a branch in the last block while training; earlier ones have less.
        dropout: of whole channels, after each ReLU of the convolutional levels and the decoder.
        size: (D, H, W) in voxels, for mixers with tables that depend on it; other sizes can be given all the same.

    Raises:
        InputError: a parameter is not possible, or a module does not fit.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        filters: Sequence[Positive] = (16, 32),
        dims: Sequence[Positive] = (64, 128, 256),
        depths: Sequence[Positive] = (2, 2, 4),
        mixer: Any = None,
        gate: Any = None,
        deep_supervision: bool = True,
        head_dim: Positive = 32,
        mlp_ratio: NotNegative = 4.0,
        drop_path: Probability = 0.0,
        dropout: Probability = 0.0,
        size: Sequence[int] = DEFAULT_SIZE,
        name: str = "hierarchical",
    ) -> None:
        check_stages(f"network '{name}'", dims=dims, depths=depths)
        if not filters or min(filters) < 1:
            raise InputError(f"network '{name}': filters={list(filters)} must be at least one positive number.")
        channels = [*filters, *dims]
        super().__init__(name, in_channels, classes, 2 ** (len(channels) - 1))
        inputs = [in_channels, *filters]
        self.convolutions = nn.ModuleList(
            EncoderLevel(inputs[i], filters[i], dropout=dropout) for i in range(len(filters))
        )
        self.pool = nn.MaxPool3d(2)
        rates = drop_path_rates(drop_path, depths)
        choices = [
            chosen or per_place(DEFAULT_MIXERS[min(stage, 1)], 1, "mixer")[0]
            for stage, chosen in enumerate(per_place(mixer, len(dims), "mixer"))
        ]
        self.stages = nn.ModuleList()
        for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            grid = coarse_grid(size, 2 ** (len(filters) + stage))
            blocks = []
            for index in range(depth):
                choice = choices[stage]
                assert choice is not None
                mixing = build_mixer(choice, dim, index, head_dim, grid)
                blocks.append(VolumeMixerBlock(dim, mixing, mlp_ratio, rates[stage][index]))
            self.stages.append(Stage(Halving(channels[len(filters) + stage - 1], dim), blocks, None))
        self.norm = ChannelNorm(dims[-1])
        above = channels[-2::-1]
        gates = skip_gates(gate, above)
        levels = [DecoderLevel(*each, dropout) for each in zip(channels[:0:-1], above, gates, strict=True)]
        self.decoder = Decoder(levels, above, classes, deep_supervision)

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        skips: list[Tensor] = []
        for level in self.convolutions:
            x = level(self.pool(x) if skips else x, x)
            skips.append(x)
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return self.decoder(self.norm(skips.pop()), skips, finest_only)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, D, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each voxel."""
        return to_channels_first(super().forward(to_channels_last(input))).contiguous()


class Halving(nn.Sequential):
    """A 3 x 3 x 3 convolution of stride 2 and a layer norm: (B, C, D, H, W) to (B, C', D / 2, H / 2, W / 2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(inputs, outputs, 3, stride=2, padding=1)
        self.norm = ChannelNorm(outputs)

"""AGUNet: a U-Net for whole volumes whose skips pass through attention gates, with the volume given at every scale.

Source: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021, arXiv 2101.07715, and the released code where it says more. With the published filters the
network has 18.66 M parameters. Each of its pieces can be switched off by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from attention.layout import to_channels_first, to_channels_last
from attention.parameters import Positive, Probability
from tasks.meningioma.networks import names
from tasks.meningioma.networks.blocks import NORM_EPS
from tasks.meningioma.networks.choices import VolumeMixerBlock, build_mixer, choose, coarse_grid, per_place
from tasks.meningioma.networks.decoder import Decoder, DecoderLevel
from tasks.meningioma.networks.encoder import Encoder, smallest_side
from tasks.meningioma.networks.volume import DEFAULT_SIZE, VolumeNetwork

FILTERS = (16, 32, 128, 256, 256)


class AGUNet(VolumeNetwork):
    """Attention-gated U-Net: volumes (B, C, D, H, W) to logits (B, K, D, H, W).

    Every axis needs more than 2 to the power of (levels + 1) voxels, of which the default network has five.

    Args:
        in_channels: channels C of the volume.
        classes: K, background included.
        filters: channels of each level, the bottleneck's last.
        input_pyramid: whether the volume joins the encoder at every scale.
        deep_supervision: whether every level of the decoder has logits, which :meth:`forward_levels` gives.
        gate: true for the paper's gates, false for none; or a gate by name, with parameters, or one for each level,
            coarsest first.
        mixer: a token mixer at the bottleneck, in the same forms; None for none, as in the paper.
        dropout: of whole channels, after each ReLU of encoder and decoder.
        head_dim: channels per head of the mixer.
        size: (D, H, W) in voxels, for mixers with tables that depend on it; other sizes can be given all the same.

    Raises:
        InputError: a parameter is not possible, or a module does not fit.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        filters: Sequence[Positive] = FILTERS,
        input_pyramid: bool = True,
        deep_supervision: bool = True,
        gate: Any = True,
        mixer: Any = None,
        dropout: Probability = 0.0,
        head_dim: Positive = 32,
        size: Sequence[int] = DEFAULT_SIZE,
        name: str = "agunet",
    ) -> None:
        smallest, halvings = smallest_side(filters), len(filters) - 1
        super().__init__(name, in_channels, classes, 2**halvings, smallest)
        self.encoder = Encoder(in_channels, filters, input_pyramid, dropout)
        self.mixer = mixer_block(mixer, filters[-1], head_dim, coarse_grid(size, 2**halvings))
        above = list(filters[-2::-1])
        inputs = list(filters[:0:-1])
        gates = skip_gates(gate, above)
        levels = [DecoderLevel(*each, dropout) for each in zip(inputs, above, gates, strict=True)]
        self.decoder = Decoder(levels, above, classes, deep_supervision)

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        bottleneck, skips = self.encoder(x)
        return self.decoder(mixed(self.mixer, bottleneck), skips, finest_only)

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The released network's state by its neutral names."""
        return names.of_agunet(state)


def skip_gates(gate: Any, filters: Sequence[int]) -> list[nn.Module | None]:
    """A gate for the skip of each level, coarsest first; true for that of AGUNet, false or None for none.

    Raises:
        InputError: a module is no gate, takes no volumes, or a parameter is impossible.
    """
    if gate is None or gate is False:
        return [None] * len(filters)
    if gate is True:
        gate = {"name": "attention_gate", "norm_eps": NORM_EPS}
    chosen = per_place(gate, len(filters), "gate")
    return [None if choice is None else choice.build(dim) for choice, dim in zip(chosen, filters, strict=True)]


def mixer_block(mixer: Any, dim: int, head_dim: int, grid: Sequence[int]) -> VolumeMixerBlock | None:
    """A block around a chosen mixer, or None.

    Raises:
        InputError: the module is no mixer, takes no volumes, or a parameter is impossible.
    """
    if mixer is None or mixer is False:
        return None
    return VolumeMixerBlock(dim, build_mixer(choose(mixer, "mixer"), dim, 0, head_dim, grid))


def mixed(block: nn.Module | None, x: Tensor) -> Tensor:
    """(B, C, D, H, W) through a block of maps with their channels last."""
    return x if block is None else to_channels_first(block(to_channels_last(x))).contiguous()

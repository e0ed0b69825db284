"""QTSeg: an encoder's pyramid, distributed over all levels, decoded by one token per class.

Source: Tran et al., QTSeg: A Query Token-Based Dual-Mix Attention Framework with Multi-Level Feature Distribution for
Medical Image Segmentation, 2024, arXiv 2412.17241. With its own encoder (``qtseg_encoder``), 9.215 million parameters
for two classes. Here the encoder may be any backbone, and images may have any size from 32 pixels on: nothing is
padded, every map has ceil(side / stride) cells and what sticks out of a finer one is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.qtseg_encoder import checkpoint_filter_fn
from tasks.qtseg.networks.bridge import FeatureDistribution
from tasks.qtseg.networks.levels import Levels
from tasks.qtseg.networks.mask_decoder import MaskDecoder

STRIDES = (8, 16, 32)


class QTSeg(nn.Module):
    """Images (B, C, H, W) to logits (B, K, H, W), for any H, W that the encoder takes.

    Args:
        encoder: gives a list of maps for an image, and has ``channels`` and ``strides``, as
            :class:`backbones.pyramid.Pyramid` does. Maps of strides 8, 16 and 32 are used, or those nearest.
        num_classes: K, with the background.
        width: the n of the paper; the levels have 4n, 8n and 16n channels.
        depths: layers of the dual-mix blocks at strides 8, 16 and 32.
        num_heads, mlp_dim: of these layers.
        gates: one for each level, finest first, on what the bridge gives.
        fine: add the encoder's map of stride 4, where it has one, in the last upsampling.

    Raises:
        InputError: a number is not possible.
    """

    def __init__(
        self,
        encoder: nn.Module,
        num_classes: int = 2,
        width: int = 16,
        depths: Sequence[int] = (1, 2, 3),
        num_heads: int = 8,
        mlp_dim: int = 2048,
        gates: Sequence[nn.Module] | None = None,
        fine: bool = True,
    ) -> None:
        super().__init__()
        made: Any = encoder
        self.num_classes = num_classes
        self.decoder = MaskDecoder(num_classes, width, depths, num_heads, mlp_dim, gates)
        self.bridge = FeatureDistribution(width)
        self.levels = Levels(made.channels, made.strides, STRIDES, [4 * width, 8 * width, 16 * width])
        has_fine = fine and 4 in made.strides
        self.fine = Levels(made.channels, made.strides, (4,), [2 * width]) if has_fine else None
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) for images (B, C, H, W)."""
        return self._resized(self.decoder(*self._levels(x)), x)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, K, H, W), and the map (B, 4n, ceil(H / 8) * 4, ceil(W / 8) * 4) that they come from."""
        logits, features = self.decoder.features(*self._levels(x))
        return self._resized(logits, x), features

    def _levels(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        maps = self.encoder(x)
        fine = None if self.fine is None else self.fine(maps, x.shape[2:])[0]
        return self.bridge(self.levels(maps, x.shape[2:])), fine

    def _resized(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits at stride 2 at the size of ``x``."""
        logits = F.interpolate(logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        return logits[..., : x.shape[2], : x.shape[3]]

    @staticmethod
    def checkpoint_filter(state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The released names (``image_encoder``, ``bridge`` or ``mlff``, ``mask_decoder``) as ours, of any size.

        A state dict of ours passes through unchanged.
        """
        plain = {key.removeprefix("module."): value for key, value in state.items()}
        if not any(key.startswith("mask_decoder.") for key in plain):
            return plain
        encoder = {key: value for key, value in plain.items() if key.startswith("image_encoder.")}
        renamed = {f"encoder.body.model.{k}": v for k, v in checkpoint_filter_fn(encoder, nn.Identity()).items()}
        for key, value in plain.items():
            if key not in encoder:
                renamed[_renamed(key)] = value
        return _stacked(renamed)


_RENAMED = (
    (r"^(?:bridge|mlff|MLFF|mlfd|MLFD)\.neck_(\d)_(\d)\.(?:conv_transpose|conv)\.", r"bridge.paths.\1.\2.conv."),
    (r"^(?:bridge|mlff|MLFF|mlfd|MLFD)\.neck_(\d)_(\d)\.bn\.", r"bridge.paths.\1.\2.norm."),
    (r"^mask_decoder\.mask_tokens\.weight$", "decoder.tokens"),
    (r"^mask_decoder\.PE_s(\d)\.positional_encoding_gaussian_matrix$", r"decoder.positions.\1.frequencies"),
    (r"^mask_decoder\.DMAB_s(\d)\.", r"decoder.blocks.\1."),
    (r"^mask_decoder\.MLP_s(\d)\.", r"decoder.mlps.\1."),
    (r"^mask_decoder\.SUB_s0\.0\.", "decoder.last.0."),
    (r"^mask_decoder\.SUB_s0\.1\.", "decoder.last.0.norm."),
    (r"^mask_decoder\.SUB_s0\.3\.", "decoder.last.1."),
    (r"^mask_decoder\.SUB_s0\.4\.", "decoder.last.1.norm."),
    (r"^mask_decoder\.SUB_s1\.0\.", "decoder.ups.0."),
    (r"^mask_decoder\.SUB_s1\.1\.", "decoder.ups.0.norm."),
    (r"^mask_decoder\.SUB_s2\.0\.", "decoder.ups.1."),
    (r"^mask_decoder\.SUB_s2\.1\.", "decoder.ups.1.norm."),
    (r"\.dm_attention\.channel_attention\.", ".by_channel."),
    (r"\.dm_attention\.spatial_attention\.cv1\.", ".by_place.conv."),
    (r"\.dm_attention\.channel_token_mix_attention\.", ".read_channels."),
    (r"\.dm_attention\.spatial_token_mix_attention\.", ".read_places."),
    (r"\.dm_attention\.token_layernorm\.", ".norm."),
    (r"\.token_mlp\.lin1\.", ".expand."),
    (r"\.token_mlp\.lin2\.", ".reduce."),
    (r"\.token_layernorm\.", ".mlp_norm."),
    (r"\.feature_mix\.", ".write."),
    (r"\.final_attn_token_to_image\.", ".read."),
    (r"\.norm_final_attn\.", ".read.norm."),
)
_TOKEN_MLP = re.compile(r"decoder\.mlps\.(\d)\.(\d+)\.layers\.(\d)\.(weight|bias)$")


def _renamed(key: str) -> str:
    for official, ours in _RENAMED:
        key = re.sub(official, ours, key)
    return key


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The class tokens' MLPs, one by one in released checkpoints, as one tensor per layer."""
    found: dict[str, dict[int, Tensor]] = {}
    others = {}
    for key, value in state.items():
        match = _TOKEN_MLP.match(key)
        if match is None:
            others[key] = value
            continue
        level, token, layer, kind = match.groups()
        name = f"decoder.mlps.{level}.{'weights' if kind == 'weight' else 'biases'}.{layer}"
        found.setdefault(name, {})[int(token)] = value.T if kind == "weight" else value[None]
    return others | {name: torch.stack([of[i] for i in sorted(of)]) for name, of in found.items()}

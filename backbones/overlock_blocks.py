"""The blocks of OverLoCK: those of static large kernels, and those whose kernels a context makes.

Source: Lou and Yu, OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels, CVPR
2025, arXiv:2502.20087. Maps are (B, C, H, W). Parameters inside a block are named as in the released code, except that
what makes and applies the dynamic kernels is a module of its own, ``mixer``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from attention.contmix import SqueezeExcitation
from attention.contmix_block import ChannelNorm, GlobalResponseNorm, LayerScale, ResidualDepthwise
from attention.conv_norm import ConvNorm
from attention.dilated_reparam import DilatedReparam, merge_reparam
from attention.dynamic_kernels import apply_kernels, average, fitting_size, kernel_logits, resize
from attention.layout import to_channels_first, to_channels_last
from kernels.errors import InputError

REGIONS = 7
"""Rows and columns of the grid of regions into which the context is averaged."""


class BaseBlock(nn.Module):
    """Static large-kernel block: depthwise 3 x 3, then large kernel, squeeze and excitation and MLP in one branch.

    Args:
        dim: channels C.
        kernel_size: side of the large kernel, odd from 5 to 19.
        mlp_ratio: hidden channels of the MLP over C.
        layer_scale: start of the scale on the identity path, or None for none.
        drop_path: probability that a sample skips the branch while training.
        merged: whether the large kernel is one convolution from the start.
    """

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float, layer_scale: float | None, drop_path: float, merged: bool
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.dwconv = ResidualDepthwise(dim)
        self.proj = nn.Sequential(
            ChannelNorm(dim),
            DilatedReparam(dim, kernel_size, merged),
            nn.BatchNorm2d(dim),
            SqueezeExcitation(dim),
            nn.Conv2d(dim, hidden, 1),
            nn.GELU(),
            ResidualDepthwise(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, dim, 1),
        )
        self.ls = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, H, W)."""
        x = self.dwconv(x)
        return self.ls(x) + self.drop_path(self.proj(x))

    def reparameterize(self) -> None:
        """Make one convolution of the large kernel and its branches; timm's ``reparameterize_model`` calls this."""
        merge_reparam(self)


class ContextMixer(nn.Module):
    """Sums of windows with kernels that each token makes of its affinity with regions of the context.

    The first half of the values' channels is summed over windows of ``smk_size``, the second over those of
    ``kernel_size``, each in 2 ``num_heads`` groups. A map with a side below ``kernel_size`` is mixed at a size whose
    shorter side is ``kernel_size``, and averaged back.

    Args:
        dim, context_dim: channels C of the values, c of the context.

    Raises:
        InputError: the channels do not fall into the groups, or the small kernel is larger than the large one.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int, kernel_size: int, smk_size: int) -> None:
        super().__init__()
        if dim % (4 * num_heads):
            raise InputError(
                f"overlock: dims of a focus stage must be multiples of 4 num_heads, since each half of the channels "
                f"falls into 2 num_heads groups; got {dim} with num_heads={num_heads}."
            )
        if not 1 <= smk_size <= kernel_size:
            raise InputError(f"overlock: smk_size={smk_size} must be from 1 to the kernel's side {kernel_size}.")
        self.split = (dim, context_dim)
        self.groups = 2 * num_heads
        self.kernel_size = kernel_size
        self.taps = smk_size**2
        self.scale = (dim // self.groups) ** -0.5
        self.weight_query = ConvNorm(dim, dim // 2)
        self.weight_key = ConvNorm(context_dim, dim // 2, first=1)
        self.weight_proj = nn.Conv2d(REGIONS**2, smk_size**2 + kernel_size**2, 1)
        self.rpb1 = nn.Parameter(torch.zeros(self.groups, 2 * smk_size - 1, 2 * smk_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(self.groups, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, values: Tensor, features: Tensor) -> Tensor:
        """Mix ``values`` (B, C, H, W) by kernels made of ``features`` (B, C + c, H, W), tokens before context."""
        size = (values.shape[2], values.shape[3])
        fitted = fitting_size(size, self.kernel_size)
        near, far = resize(values, None, fitted)[0].chunk(2, dim=1)
        tokens, context = resize(features, None, fitted)[0].split(self.split, dim=1)
        query = self.weight_query(tokens)
        key = self.weight_key(average(context, None, (REGIONS, REGIONS))[0])
        assert self.weight_proj.bias is not None
        logits = kernel_logits(query, key, self.weight_proj.weight, self.weight_proj.bias, self.groups, self.scale)
        near = apply_kernels(near, logits[..., : self.taps], self.rpb1, None)
        far = apply_kernels(far, logits[..., self.taps :], self.rpb2, None)
        mixed = torch.cat((near, far), dim=1)
        return mixed if fitted == size else average(mixed, None, size)[0]


class ChosenMixer(nn.Module):
    """Any registered mixer in the place of :class:`ContextMixer`, on normalised values.

    The context then acts by what it adds to the values and to the gate.
    """

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.mixer = mixer

    def forward(self, values: Tensor, features: Tensor) -> Tensor:
        """Mix ``values`` (B, C, H, W); the features are of no account."""
        return to_channels_first(self.mixer(to_channels_last(self.norm(values))))


class FocusBlock(nn.Module):
    """Dynamic block of a focus stage, on tokens (C channels) and their context (c channels) side by side.

    Args:
        dim, context_dim: C and c.
        mixer: maps values (B, C, H, W) and normalised features (B, C + c, H, W) to (B, C, H, W).
        kernel_size: side of the static kernel that is added to the mixer.
        mlp_ratio: hidden channels of the MLP over C, not over C + c.
        layer_scale: start of the scales on the identity paths, or None for none.
        drop_path: probability that a sample skips a branch while training.
        first: whether no block has changed the context yet, so that there is nothing to remind it of.
        merged: whether the static kernel is one convolution from the start.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        mixer: nn.Module,
        kernel_size: int,
        mlp_ratio: float,
        layer_scale: float | None,
        drop_path: float,
        first: bool,
        merged: bool,
    ) -> None:
        super().__init__()
        joint, hidden = dim + context_dim, int(dim * mlp_ratio)
        self.split = (dim, context_dim)
        self.x_scale = None if first else LayerScale(context_dim, 1)
        self.h_scale = None if first else LayerScale(context_dim, 1)
        self.dwconv1 = ResidualDepthwise(joint)
        self.norm1 = ChannelNorm(joint)
        self.fusion = nn.Sequential(
            nn.Conv2d(joint, joint, 3, padding=1, groups=joint),
            nn.BatchNorm2d(joint),
            nn.GELU(),
            nn.Conv2d(joint, dim, 1),
            GlobalResponseNorm(dim),
        )
        self.mixer = mixer
        self.dyconv_proj = ConvNorm(dim, dim)
        self.lepe = nn.Sequential(DilatedReparam(dim, kernel_size, merged), nn.BatchNorm2d(dim))
        self.se_layer = SqueezeExcitation(dim)
        self.gate = ConvNorm(dim, dim)
        self.proj = nn.Sequential(nn.BatchNorm2d(dim), nn.Conv2d(dim, joint, 1))
        self.dwconv2 = ResidualDepthwise(joint)
        self.norm2 = ChannelNorm(joint)
        self.mlp = nn.Sequential(
            nn.Conv2d(joint, hidden, 1),
            nn.GELU(),
            ResidualDepthwise(hidden),
            GlobalResponseNorm(hidden),
            nn.Conv2d(hidden, joint, 1),
        )
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(joint, layer_scale)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(joint, layer_scale)
        self.drop_path = DropPath(drop_path)

    def forward(self, joint: Tensor, guide: Tensor) -> Tensor:
        """Transform (B, C + c, H, W); ``guide`` (B, c, H, W) is the context as it came to the stage."""
        if self.x_scale is not None and self.h_scale is not None:
            x, context = joint.split(self.split, dim=1)
            joint = torch.cat((x, self.x_scale(context) + self.h_scale(guide)), dim=1)
        joint = self.dwconv1(joint)
        features = self.norm1(joint)
        values = self.fusion(features)
        mixed = self.dyconv_proj(self.mixer(values, features)) + self.lepe(values)
        gated = F.silu(self.gate(values)) * self.se_layer(mixed)
        joint = self.ls1(joint) + self.drop_path(self.proj(gated))
        joint = self.dwconv2(joint)
        return self.ls2(joint) + self.drop_path(self.mlp(self.norm2(joint)))

    def reparameterize(self) -> None:
        """Make one convolution of each large static kernel and its branches; see :class:`BaseBlock`."""
        merge_reparam(self)

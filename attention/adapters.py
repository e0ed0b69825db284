"""Mixers in networks that are not ours: in place of a self-attention on tokens (B, N, C).

MONAI's transformers (ViT, UNETR, ViTAutoEnc) flatten a volume to tokens before their blocks. Their self-attention is
replaced here by any registered mixer that takes the volume's axes; MONAI itself is imported only when it is asked for.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention.mixer import Mixer
from attention.registry import available, build_in_block, class_of
from attention.softmax_cross import SoftmaxCross
from kernels.errors import InputError


class TokenBlockMixer(nn.Module):
    """A mixer on tokens (B, N, C) that are a flattened map, the last axis running fastest.

    Args:
        mixer: what mixes the map (B, *grid, C).
        grid: the axes of the map; None for a mixer of sequences, whatever their length.
        prefix: class tokens in front that have no place in the map. The mixer does not see them; they read all tokens
            by a softmax cross attention of their own. A sequence has places for them.
        save_attn: whether the weights of the last call are kept in ``att_mat``, as MONAI's blocks do on request.

    Raises:
        InputError: the mixer does not take as many axes, or has no weights to save.
    """

    def __init__(
        self, mixer: Mixer, grid: Sequence[int] | None = None, prefix: int = 0, save_attn: bool = False
    ) -> None:
        super().__init__()
        _check_axes(mixer.name or type(mixer).__name__, mixer.grids, grid)
        if save_attn and not mixer.has_weights:
            raise InputError(f"attention '{mixer.name}' has no weights between tokens to save; leave save_attn out.")
        if prefix < 0 or (grid is not None and min(grid, default=0) < 1):
            raise InputError(f"prefix={prefix} must not be negative, and every axis of grid={grid} at least 1.")
        self.mixer = mixer
        self.grid = None if grid is None else tuple(grid)
        self.prefix = 0 if grid is None else prefix
        self.reader = SoftmaxCross(mixer.dim, mixer.num_heads) if self.prefix else None
        self.save_attn = save_attn
        self.att_mat = torch.Tensor()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (B, prefix + N, C).
            attn_mask: (B, prefix + N), true or not 0 for real tokens, as in MONAI; the output of others is 0.

        Returns:
            (B, prefix + N, C).

        Raises:
            InputError: there are not as many tokens as the grid has places.
        """
        grid = (x.shape[1],) if self.grid is None else self.grid
        if x.dim() != 3 or x.shape[1] != self.prefix + math.prod(grid):
            raise InputError(
                f"a grid of {grid} and {self.prefix} tokens in front are {self.prefix + math.prod(grid)} tokens; got "
                f"{tuple(x.shape)}. Set grid to the axes of the map after its patches were cut."
            )
        real = None if attn_mask is None else attn_mask != 0
        places = x[:, self.prefix :].unflatten(1, grid)
        mask = None if real is None else real[:, self.prefix :].unflatten(1, grid)
        if self.save_attn:
            mixed, weights = self.mixer(places, mask, return_attention=True)
            self.att_mat = weights.detach()
        else:
            mixed = self.mixer(places, mask)
        out: Tensor = mixed.flatten(1, -2)
        if self.reader is None:
            return out
        front = self.reader(x[:, : self.prefix], x, real)
        if real is not None:
            front = front.masked_fill(~real[:, : self.prefix, None], 0)
        return torch.cat([front, out], 1)


def replace_monai_attention(
    network: nn.Module,
    attention: str | Callable[[int, int], Mixer],
    *,
    grid: Sequence[int] | None,
    prefix: int | None = None,
    copy_projections: bool = False,
    **params: Any,
) -> nn.Module:
    """Give every transformer block of a MONAI network another self-attention (in place).

    Args:
        network: holds ``monai.networks.blocks.TransformerBlock``, as ViT, UNETR and ViTAutoEnc do.
        attention: name or dotted path of a mixer, or what makes one from channels and heads.
        grid: the map's axes in tokens, such as ``(6, 6, 6)`` for 96^3 voxels in patches of 16^3; None for mixers of
            sequences.
        prefix: class tokens in front; None for 1 in a network that has a ``cls_token`` and 0 elsewhere.
        copy_projections: whether layers ``qkv`` and ``proj`` of the mixer start with the weights of the attention that
            is replaced, where they have the same shape; a bias that was not there starts at 0.
        params: of the mixer.

    Returns:
        ``network``.

    Raises:
        InputError: MONAI is not installed, the network has no such block, a block cannot be replaced, or the mixer does
            not take the grid; nothing is replaced then.
    """
    try:
        block_class = importlib.import_module("monai.networks.blocks.transformerblock").TransformerBlock
    except ImportError as error:
        raise InputError(f"MONAI cannot be imported ({error}); install it with 'pip install monai'.") from error
    blocks = [module for module in network.modules() if isinstance(module, block_class)]
    if not blocks:
        raise InputError(
            f"{type(network).__name__} has no TransformerBlock of MONAI whose attention could be replaced; ViT, UNETR "
            "and ViTAutoEnc have."
        )
    if any(getattr(block.attn, "causal", False) for block in blocks):
        raise InputError(f"the attention of {type(network).__name__} is causal, and mixers look both ways.")
    if prefix is None:
        prefix = int(any(isinstance(getattr(m, "cls_token", None), nn.Parameter) for m in network.modules()))
    made = [_substitute(block, index, attention, grid, prefix, params) for index, block in enumerate(blocks)]
    for block, substitute in zip(blocks, made, strict=True):
        if copy_projections:
            _copy_projections(block.attn, substitute.mixer)
        block.attn = substitute
    return network


def _substitute(
    block: nn.Module,
    index: int,
    attention: str | Callable[[int, int], Mixer],
    grid: Sequence[int] | None,
    prefix: int,
    params: dict[str, Any],
) -> TokenBlockMixer:
    """What replaces the attention of a block that is number ``index``, on its device and in its dtype."""
    old, norm = block.get_submodule("attn"), block.get_submodule("norm1")
    assert isinstance(norm, nn.LayerNorm)
    dim, heads = norm.normalized_shape[0], old.num_heads
    assert isinstance(heads, int)
    if isinstance(attention, str):
        mixer = _make(attention, dim, heads, grid, index, params)
    else:
        mixer = attention(dim, heads)
    substitute = TokenBlockMixer(mixer, grid, prefix, save_attn=bool(getattr(old, "save_attn", False)))
    return substitute.to(norm.weight.device, norm.weight.dtype).train(old.training)


def _make(name: str, dim: int, heads: int, grid: Sequence[int] | None, index: int, params: dict[str, Any]) -> Mixer:
    cls = class_of(name, "mixer")
    assert issubclass(cls, Mixer)
    _check_axes(name, cls.grids, grid)
    known = {"num_heads": heads} | ({} if grid is None else {"input_size": tuple(grid), "axes": len(grid)})
    mixer = build_in_block(cls, name, index, dim=dim, offers=known, params=params)
    assert isinstance(mixer, Mixer)
    return mixer


def _check_axes(name: str, grids: Sequence[int], grid: Sequence[int] | None) -> None:
    axes = 1 if grid is None else len(grid)
    if axes in grids:
        return
    fitting = [other for other in available("mixer") if axes in getattr(class_of(other, "mixer"), "grids", ())]
    raise InputError(
        f"attention '{name}' takes maps of {' or '.join(map(str, grids))} axes, and these have {axes}; those that fit: "
        f"{', '.join(fitting)}."
    )


def _copy_projections(old: nn.Module, mixer: Mixer) -> None:
    for source, target in (("qkv", "qkv"), ("out_proj", "proj")):
        given, taken = getattr(old, source, None), getattr(mixer, target, None)
        if not (isinstance(given, nn.Linear) and isinstance(taken, nn.Linear)):
            continue
        if given.weight.shape != taken.weight.shape:
            continue
        with torch.no_grad():
            taken.weight.copy_(given.weight)
            if taken.bias is not None:
                taken.bias.zero_() if given.bias is None else taken.bias.copy_(given.bias)

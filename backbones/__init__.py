"""Image backbones and tile encoders by name: every timm model, the named pathology encoders, or a class of your own.

Importing this package loads neither torch nor timm; the first call does.

>>> import backbones
>>> backbones.available("resnet1*")[:2]
['resnet10t', 'resnet14t']
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from backbones.encoder import Encoder
    from backbones.swap import Change

__all__ = ["add_gates", "available", "create", "create_encoder", "replace_attention"]


def available(pattern: str | None = None) -> list[str]:
    """Names of all backbones in alphabetical order, or of those that match a wildcard pattern such as ``"res*"``."""
    from backbones import registry

    return registry.available(pattern)


def create(
    name: str,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    attention: str | type[nn.Module] | Mapping[str, Any] | Sequence[Any] | None = None,
    *,
    out_strides: Sequence[int] | None = None,
    level_norms: bool = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    checkpoint: str | Path | None = None,
    lora: str | Mapping[str, Any] | None = None,
    **params: Any,
) -> nn.Module:
    """Build the backbone called ``name`` as a timm model, with weights from the model hub only when ``pretrained``.

    With ``features_only`` it is a :class:`backbones.pyramid.Pyramid`, whatever the network: images (B, C, H, W) of any
    H, W >= 32 to a list of contiguous maps (B, channels, ceil(H / stride), ceil(W / stride)), finest first.

    Args:
        name: a name of :func:`available`, with or without a timm tag (``resnet18``, ``resnet18.a1_in1k``), the same
            behind ``timm:``, a model hub id behind ``hf-hub:``, or a dotted path ``package.module:Class``.
        features_only: return a module that gives the list of feature maps instead of logits.
        out_indices: which feature maps, counted from the finest; timm's choice when left out.
        out_strides: instead, their strides, such as (4, 8, 16, 32); 2 is added by a small stem where there is none.
        level_norms, frozen_stages, norm_eval: of feature maps; see :class:`backbones.pyramid.Pyramid`.
        checkpoint: a weights file (safetensors or PyTorch), or a folder that holds one: timm's, the authors' or one of
            this project; see :class:`backbones.checkpoints.Weights`. Instead of ``pretrained``.
        lora: train low-rank adapters of some linear layers and nothing else; see :func:`backbones.lora.add_lora`.
        attention: a registered module, by its name, by a dotted path, by a mapping of ``name`` and parameters, or by a
            list of these with one entry per stage, where None leaves the stage as it is. A mixer takes the place of a
            transformer's own attention, a gate follows each stage of a convolutional pyramid; weights of everything
            else are kept, and feature maps are NCHW. See :mod:`backbones.swap` for the families. Of our own backbones
            that take both, a gate beside a mixer is given as ``gate``.
        params: passed on to the model; ``img_size`` is also what tables of a mixer that depend on it are built for, and
            is of no account for networks that take any size.

    Raises:
        InputError: the name is unknown, a parameter is not taken, the backbone has no place for the attention or no
            such map or stage, or the weights cannot be had or are of another model.
    """
    from backbones import registry

    return registry.create(
        name,
        pretrained,
        features_only,
        out_indices,
        attention,
        out_strides=out_strides,
        level_norms=level_norms,
        frozen_stages=frozen_stages,
        norm_eval=norm_eval,
        checkpoint=checkpoint,
        lora=lora,
        **params,
    )


def replace_attention(model: nn.Module, attention: Any, *, img_size: int | Sequence[int] | None = None) -> Change:
    """Put mixers in the place of the token mixers of a timm model; see :func:`backbones.swap.replace_attention`."""
    from backbones import swap

    return swap.replace_attention(model, attention, img_size=img_size)


def add_gates(model: nn.Module, gate: Any) -> Change:
    """Put gates after the stages of a convolutional timm model; see :func:`backbones.swap.add_gates`."""
    from backbones import swap

    return swap.add_gates(model, gate)


def create_encoder(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 1,
    params: Mapping[str, Any] | None = None,
) -> Encoder:
    """Build the tile encoder called ``name``: uint8 RGB tiles (B, 3, H, W) in, float32 features (B, dim) out.

    Args:
        name: as in :func:`create`; those of :mod:`backbones.pathology` come with their preprocessing and pooling.
        pretrained: take the published weights from the model hub's local cache, or download them.
        checkpoint: a weights file (safetensors or PyTorch) or a folder that holds one; instead of ``pretrained``.
        seed: of the random weights when neither is given; the global random state is left as it was.
        params: passed on to the model.

    Raises:
        InputError: as :func:`create`; or the checkpoint is missing, unreadable, or of another model.
    """
    from backbones import encoder

    return encoder.create_encoder(name, pretrained=pretrained, checkpoint=checkpoint, seed=seed, params=params)

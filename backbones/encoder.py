"""A backbone that turns tiles into feature vectors: resizing, normalisation, network and pooling as one module."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import registry
from backbones.checkpoints import digest, find_file, load, load_from_hub, read_state, state_digest
from backbones.pathology import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, Pooling
from backbones.random_weights import CALIBRATION_IMAGES, coloured_noise, make_useful
from kernels.errors import InputError

# Part of every fingerprint; raised whenever the same settings would give other features.
_VERSION = 2


@dataclass(frozen=True)
class Preprocessing:
    """What happens to a tile before the network sees it.

    Attributes:
        input_size: side of the square the network sees, pixels.
        resize: side the tile is resized to first; when larger than ``input_size`` the centre is cut out.
        mean, std: per channel, for intensities in [0, 1].
    """

    input_size: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class Encoder(nn.Module):
    """uint8 RGB tiles (B, 3, H, W) of any size in, float32 features (B, dim) out; always in evaluation mode.

    Attributes:
        name: the backbone's name.
        dim: number of features.
        input_size, mean, std: see :class:`Preprocessing`.
        mpp: micrometres per pixel the encoder was made for, or None when it says nothing of it.
        tile: side in pixels, at ``mpp``, of the tiles it was made for, or None.
        weights: one line that says where the weights came from.
        fingerprint: changes whenever name, parameters, weights or preprocessing do.
        spec: arguments of :func:`backbones.create_encoder` that make this encoder again; empty for one made by hand.
    """

    scale: Tensor
    shift: Tensor
    centre: Tensor | None
    spread: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        dim: int,
        preprocessing: Preprocessing,
        pooling: Pooling = "model",
        mpp: float | None = None,
        tile: int | None = None,
        weights: str = "",
        params: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.spec: dict[str, Any] = {}
        self.dim = dim
        self.preprocessing = preprocessing
        self.pooling: Pooling = pooling
        self.mpp = mpp
        self.tile = tile
        self.weights = weights
        # Convolutions of 224-px tiles run 1.4 to 2.5 times faster on the CPU in this layout, transformers no slower.
        self.model = model.requires_grad_(False).to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.register_buffer("centre", None, persistent=False)
        self.register_buffer("spread", None, persistent=False)
        described = [_VERSION, name, dict(params or {}), weights, dim, vars(preprocessing), pooling]
        self.fingerprint = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.eval()

    @property
    def input_size(self) -> int:
        return self.preprocessing.input_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.preprocessing.std

    def train(self, mode: bool = True) -> Encoder:
        """Stay in evaluation mode, so that the features of a tile do not depend on its batch."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, tiles: Tensor) -> Tensor:
        image = self.prepare(tiles)
        if self.pooling == "class_and_mean":
            network = cast(VisionTransformer, self.model)
            tokens = network.forward_features(image)
            spatial = tokens[:, network.num_prefix_tokens :]
            features = torch.cat((tokens[:, 0], spatial.mean(dim=1)), dim=1).float()
        else:
            features = self.model(image).float()
        if self.centre is None or self.spread is None:
            return features
        return (features - self.centre) / self.spread

    @torch.no_grad()
    def calibrate(self, seed: int) -> None:
        """Make freshly initialised weights useful: see :mod:`backbones.random_weights`."""
        tiles = coloured_noise(CALIBRATION_IMAGES, self.input_size, torch.Generator().manual_seed(seed))
        make_useful(self.model, self.prepare(tiles))
        features = self(tiles)
        # A feature that never varies is left at zero rather than blown up.
        self.centre, self.spread = features.mean(0), features.std(0).clamp_min(1e-3 * features.std() + 1e-12)

    def prepare(self, tiles: Tensor) -> Tensor:
        """Tiles (B, 3, H, W) uint8, any layout, to normalised images (B, 3, input_size, input_size), channels last."""
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[1] != 3:
            raise ValueError(f"tiles must be uint8 (B, 3, H, W), not {tiles.dtype} {tuple(tiles.shape)}")
        tiles = _crop_centre(_resize(tiles, self.preprocessing.resize), self.input_size)
        image = tiles.to(self.scale.dtype, memory_format=torch.channels_last)
        return image.mul_(self.scale).add_(self.shift)


def create_encoder(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    seed: int = 1,
    params: Mapping[str, Any] | None = None,
) -> Encoder:
    """See :func:`backbones.create_encoder`."""
    params = dict(params or {})
    if pretrained and checkpoint is not None:
        raise InputError(
            f"backbone '{name}' is asked for both pretrained=true and checkpoint={checkpoint}; choose one of them."
        )
    file = find_file(checkpoint) if checkpoint is not None else None
    entry = ENCODERS.get(name.removeprefix("timm:"))
    # Random weights come from the seed alone: the CPU generator is set aside, others are not touched.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _build(name, pretrained and entry is None, params)
    if file is not None:
        load(model, read_state(file), entry.name if entry else name, f"backbone.checkpoint={file}")
        weights = f"{file.name} (sha256 {digest(file)})"
    elif registry.is_dotted_path(name):
        weights = f"as {name} is built (sha256 {state_digest(model)})"  # it may have read weights of its own
    elif not pretrained:
        weights = f"random, seed {seed}"
    elif entry is not None:
        weights = load_from_hub(model, entry)
    else:
        weights = f"pretrained: {_source(model, name)}"
    encoder = Encoder(
        model,
        name=name,
        dim=_feature_size(model) * (2 if entry and entry.pooling == "class_and_mean" else 1),
        preprocessing=_preprocessing(model, name, params),
        pooling=entry.pooling if entry else "model",
        mpp=entry.mpp if entry else None,
        tile=entry.tile if entry else None,
        weights=weights,
        params=params,
    )
    encoder.spec = {
        "name": name,
        "pretrained": pretrained,
        "checkpoint": None if file is None else str(file.absolute()),
        "seed": seed,
        "params": params,
    }
    if weights.startswith("random"):
        encoder.calibrate(seed)
    return encoder


def _build(name: str, pretrained: bool, params: dict[str, Any]) -> nn.Module:
    arguments = dict(params) if registry.is_dotted_path(name) else {"num_classes": 0, **params}
    return registry.create(name, pretrained=pretrained, **arguments)


def _preprocessing(model: nn.Module, name: str, params: Mapping[str, Any]) -> Preprocessing:
    """From the model's own description; an ``img_size`` among the parameters goes before it."""
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    height, width = cfg.get("input_size", (3, 224, 224))[1:]
    if "img_size" in params:
        size = params["img_size"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)
    if height != width:
        raise InputError(
            f"backbone '{name}' takes images of {width} x {height} px; tiles are square, choose another one."
        )
    mean, std = tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"backbone '{name}' takes images of {len(mean)} channels; tiles are RGB, choose another one.")
    entry = ENCODERS.get(name.removeprefix("timm:"))
    ratio = entry.resize / entry.input_size if entry and entry.resize else 1.0
    return Preprocessing(height, round(height * ratio), mean, std)


def _feature_size(model: nn.Module) -> int:
    """Length of the pooled feature vector; convolutional networks with a layer after the pooling name it apart."""
    for attribute in ("head_hidden_size", "num_features"):
        size = getattr(model, attribute, None)
        if isinstance(size, int):
            return size
    raise InputError(
        f"backbone class {type(model).__name__} has no attribute 'num_features'; set it to the length of its output."
    )


def _source(model: nn.Module, name: str) -> str:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    tag = f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") and cfg.get("architecture") else name
    return f"{tag} ({cfg['hf_hub_id']})" if cfg.get("hf_hub_id") else tag


def _resize(tiles: Tensor, side: int) -> Tensor:
    """Antialiased bicubic to ``side`` x ``side``, uint8 in and out."""
    if tiles.shape[-2:] == (side, side):
        return tiles
    if tiles.device.type == "cpu":  # PyTorch has a vectorised path for uint8 here, exact with Pillow
        return F.interpolate(tiles, size=(side, side), mode="bicubic", antialias=True)
    resized = F.interpolate(tiles.float(), size=(side, side), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _crop_centre(tiles: Tensor, side: int) -> Tensor:
    top, left = (tiles.shape[-2] - side) // 2, (tiles.shape[-1] - side) // 2
    return tiles[..., top : top + side, left : left + side]

"""QTSeg step by step as published: each convolution apart from its norm, every map made, every token projected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.qtseg.networks.qtseg import QTSeg


def released(network: QTSeg) -> Callable[[Tensor], Tensor]:
    """The forward pass of a network whose encoder is ``qtseg_encoder``, with its own weights."""
    made: Any = network

    def run(x: Tensor) -> Tensor:
        levels = _encoder(made.encoder.model, x)
        levels = [
            torch.cat([_unit(path, y) for path, y in zip(row, levels, strict=True)], 1) for row in made.bridge.paths
        ]
        logits = _decoder(made.decoder, levels)
        return F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)

    return run


def _unit(unit: Any, x: Tensor) -> Tensor:
    return F.silu(unit.norm(unit.conv(x)))


def _cross_stage(block: Any, x: Tensor) -> Tensor:
    pieces = list(_unit(block.enter, x).chunk(2, 1))
    for first, second in block.blocks:
        y = _unit(second, _unit(first, pieces[-1]))
        pieces.append(pieces[-1] + y if block.shortcut else y)
    return _unit(block.leave, torch.cat(pieces, 1))


def _encoder(model: Any, x: Tensor) -> list[Tensor]:
    x = _unit(model.stem, x)
    found = []
    for stage in model.stages:
        x = _cross_stage(stage[1], _unit(stage[0], x))
        if len(stage) == 3:
            pools = [_unit(stage[2].enter, x)]
            for _ in range(3):
                pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
            x = _unit(stage[2].leave, torch.cat(pools, 1))
        found.append(x)
    _, fine, middle, deep = found
    middle = _cross_stage(model.up16, torch.cat([F.interpolate(deep, scale_factor=2.0), middle], 1))
    f8 = _cross_stage(model.up8, torch.cat([F.interpolate(middle, scale_factor=2.0), fine], 1))
    f16 = _cross_stage(model.down16[1], torch.cat([_unit(model.down16[0], f8), middle], 1))
    f32 = _cross_stage(model.down32[1], torch.cat([_unit(model.down32[0], f16), deep], 1))
    return [f8, f16, f32]


def _decoder(decoder: Any, levels: Sequence[Tensor]) -> Tensor:
    tokens = decoder.tokens.expand(len(levels[0]), -1, -1)
    features: Any = 0
    for i in (2, 1, 0):
        features = levels[i] + features
        tokens, features = _block(decoder.blocks[i], tokens, features, _position(decoder.positions[i], features))
        mlp = decoder.mlps[i]
        found = []
        for k in range(tokens.shape[1]):
            token = tokens[:, k]
            for layer, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
                token = F.linear(token.relu() if layer else token, weight[k].T, bias[k, 0])
            found.append(token)
        tokens = torch.stack(found, 1)
        for up in (decoder.ups[i - 1],) if i else decoder.last:
            features = F.conv_transpose2d(features, up.weight, up.bias, 2)
            features = F.gelu(_channel_norm(features, up.norm))
    return (tokens @ features.flatten(2)).unflatten(2, features.shape[2:])


def _channel_norm(x: Tensor, norm: Any) -> Tensor:
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    x = (x - mean) / (variance + norm.eps).sqrt()
    return norm.weight[:, None, None] * x + norm.bias[:, None, None]


def _position(module: Any, features: Tensor) -> Tensor:
    height, width = features.shape[2:]
    ones = features.new_ones(height, width)
    y, x = (ones.cumsum(0) - 0.5) / height, (ones.cumsum(1) - 0.5) / width
    angles = 2 * math.pi * ((2 * torch.stack([x, y], -1) - 1) @ module.frequencies)
    return torch.cat([angles.sin(), angles.cos()], -1).permute(2, 0, 1).expand_as(features)


def _block(block: Any, tokens: Tensor, features: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    first = tokens
    grid, places = features.shape[2:], position.flatten(2).mT
    for layer in block.layers:
        x = features + position
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        by_place = x * layer.by_place.conv(statistics).sigmoid() + x
        flat = x.flatten(2)
        energy = flat @ flat.mT
        shares = (energy.amax(-1, keepdim=True).expand_as(energy) - energy).softmax(-1)
        by_channel = layer.by_channel.gamma * (shares @ flat).unflatten(2, grid) + x
        of_places, of_channels = by_place.flatten(2).mT, by_channel.flatten(2).mT
        read = _attend(layer.read_places, tokens, of_places, of_places)
        mixed = layer.norm(read + _attend(layer.read_channels, tokens, of_channels, of_channels) + tokens)
        tokens = layer.mlp_norm(layer.reduce(F.gelu(layer.expand(mixed)))) + tokens
        written = _attend(layer.write, of_places + of_channels + places, mixed, mixed)
        features = features + written.mT.unflatten(2, grid)
    flat = features.flatten(2).mT
    read = _attend(block.read, tokens + first, flat + places, flat)
    return block.read.norm(tokens + read), features


def _attend(reader: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (reader.num_heads, -1)).transpose(1, 2)

    q, k, v = heads(reader.q_proj(q)), heads(reader.k_proj(k)), heads(reader.v_proj(v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return reader.out_proj((weights @ v).transpose(1, 2).flatten(2))

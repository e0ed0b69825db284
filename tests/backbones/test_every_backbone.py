"""The one contract of feature maps, held against every network of ours and a few of timm's."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import backbones
from backbones import registry, swap
from backbones.any_size import cells
from backbones.pyramid import Pyramid
from tests.backbones.small import OF_TIMM, small_params

NO_MAPS = {"conch_v1_5"}  # reads its tokens out by one query
OURS = [n for n in backbones.available() if timm.model_entrypoint(n).__module__.startswith("backbones.")]
NAMES = [*(name for name in OURS if name not in NO_MAPS), *OF_TIMM]
SIZES = [(64, 96), (75, 45)]

every = pytest.mark.parametrize("name", NAMES)


def build(name: str, **params: Any) -> Any:
    torch.manual_seed(0)
    return backbones.create(name, features_only=True, **small_params(name) | params)


@functools.cache
def pyramid(name: str) -> Pyramid:
    return build(name).eval()


def images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@every
@torch.no_grad()
def test_maps_are_as_promised_for_an_ordinary_and_an_odd_image(name: str) -> None:
    model = pyramid(name)
    assert isinstance(model, Pyramid)
    assert len(model.channels) == len(model.strides) == len(model.feature_info.channels())
    assert list(model.strides) == sorted(model.strides)
    assert len(model.mean) == len(model.std) == 3
    for size in SIZES:
        maps = model(images(size))
        shapes = [tuple(y.shape) for y in maps]
        assert shapes == [
            (2, width, cells(size[0], stride), cells(size[1], stride))
            for width, stride in zip(model.channels, model.strides, strict=True)
        ]
        assert all(math.ceil(size[0] / s - 1e-6) == shape[2] for s, shape in zip(model.strides, shapes, strict=True))
        assert all(y.is_contiguous() and y.isfinite().all() for y in maps)
    torch.testing.assert_close(model(images(SIZES[1]))[-1][:1], model(images(SIZES[1])[:1])[-1], rtol=1e-3, atol=1e-4)


@every
def test_gradients_reach_the_image_and_the_weights(name: str) -> None:
    model = pyramid(name)
    x = images((64, 64), 1).requires_grad_()
    model.zero_grad()
    sum(y.square().mean() for y in model(x)).backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()
    reached = [p.grad is not None for p in model.parameters() if p.requires_grad]
    assert sum(reached) > 0.9 * len(reached)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@every
@torch.no_grad()
def test_half_precision_is_finite(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert all(y.isfinite().all() for y in pyramid(name)(images((64, 64), 1)))


@every
@torch.no_grad()
def test_weights_go_round(name: str, tmp_path: Any) -> None:
    model, x = pyramid(name), images((64, 64), 1)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    for kind in ({}, {"checkpoint": file}):
        torch.manual_seed(3)
        other = backbones.create(name, features_only=True, **small_params(name) | kind).eval()
        if not kind:
            other.load_state_dict(model.state_dict())
        for ours, theirs in zip(other(x), model(x), strict=True):
            assert torch.equal(ours, theirs)


@every
def test_frozen_stages_stay_frozen(name: str) -> None:
    model = build(name, frozen_stages=1, norm_eval=True)
    still = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert still and any(p.requires_grad for p in model.parameters())
    assert model.train() is model and model.eval() is model
    model.train()
    assert still == {key for key, p in model.named_parameters() if not p.requires_grad}
    frozen = {module for key in still for module in [model.get_submodule(key.rpartition(".")[0])]}
    assert all(
        not module.training
        for module in frozen
        if "Pyramid" not in type(module).__name__ and module not in (model.model, model.body)
    )
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    sum(y.square().mean() for y in model(images((64, 64)))).backward()
    assert all(p.grad is None for key, p in model.named_parameters() if key in still)


@every
@torch.no_grad()
def test_another_attention_is_taken_where_it_has_a_place(name: str) -> None:
    accepted = registry.parameters_of(name)
    takes = [kind for kind in ("mixer", "gate") if {"mixer": "attention", "gate": "gate"}[kind] in accepted]
    takes = takes or swap.takes(pyramid(name).model)
    if not takes:
        pytest.skip("has no place for another attention")
    choice = {"mixer": "softmax", "gate": {"name": "ela", "variant": "timm"}}[takes[0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build(name, attention=choice).eval()
    whole = backbones.create(name, attention=choice, **small_params(name))  # with what no map needs
    assert any(getattr(module, "name", None) in ("softmax", "ela") for module in whole.modules())
    for size in SIZES:
        assert [y.shape for y in model(images(size, 1))] == [y.shape for y in pyramid(name)(images(size, 1))]

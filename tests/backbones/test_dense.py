"""GC ViT for images of any size, and the norms behind the levels of a pyramid."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import timm
import torch
from torch import nn

import backbones
from backbones import checkpoints
from backbones.dense import LevelNorms, checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import ODD, Conventions

TINY: dict[str, Any] = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4), "img_size": 64}


class TestAnySizeGCViT(Conventions):
    name = "gcvit_any_xxtiny"
    tiny: ClassVar[dict[str, Any]] = TINY


@pytest.mark.parametrize("size", ["xxtiny", "xtiny", "tiny", "small", "base"])
def test_each_variant_is_that_of_timm(size: str) -> None:
    with torch.device("meta"):
        ours, theirs = backbones.create(f"gcvit_any_{size}"), timm.create_model(f"gcvit_{size}")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_the_native_size_gives_the_numbers_of_timm() -> None:
    theirs = timm.create_model("gcvit_xxtiny", img_size=64, num_classes=5).eval()
    ours = backbones.create("gcvit_any_xxtiny", img_size=64, num_classes=5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model = backbones.create("gcvit_any_xxtiny", num_classes=5, **TINY).eval().double()
    x = torch.randn(3, 3, *ODD, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), torch.cat([model(image[None]) for image in x]))


def test_a_list_of_query_pools_of_another_length_is_refused() -> None:
    with pytest.raises(InputError, match=r"query_pools=\[1\]"):
        backbones.create("gcvit_any_xxtiny", query_pools=[1], **TINY)


def _davit(**params: Any) -> nn.Module:
    return backbones.create(
        "davit_tiny", depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_classes=5, **params
    )


def test_every_level_is_normalised_over_its_channels() -> None:
    model = LevelNorms(_davit(), out_indices=(1, 3)).eval()
    maps = model(torch.randn(2, 3, *ODD) * 5)
    assert [tuple(y.shape[1:]) for y in maps] == [(16, 10, 14), (32, 3, 4)]
    assert model.channels == [16, 32] and model.strides == [8, 32]
    for y in maps:
        torch.testing.assert_close(y.mean(1), torch.zeros_like(y[:, 0]), atol=1e-5, rtol=0)


def test_a_level_that_the_model_normalises_gets_no_second_norm() -> None:
    pyramid = backbones.create("gcvit_any_xxtiny", **TINY).eval()
    model, x = LevelNorms(pyramid, normed=[3]).eval(), torch.randn(1, 3, *ODD)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[3], pyramid.forward_intermediates(x)[1][3])
    assert list(model.level_norms) == ["0", "1", "2"]


def test_an_imagenet_checkpoint_loads_and_leaves_the_new_norms_as_they_are() -> None:
    plain, model = _davit(), LevelNorms(_davit())
    checkpoints.load(model, plain.state_dict(), "davit", "a file")
    assert torch.equal(model.model.get_parameter("stem.conv.weight"), plain.get_parameter("stem.conv.weight"))
    assert all((norm.weight == 1).all() and not norm.bias.any() for norm in model.level_norms.values())
    # A dense checkpoint of ours comes back as it is.
    nn.init.constant_(model.level_norms["2"].weight, 3.0)
    again = checkpoint_filter_fn(dict(model.state_dict()), LevelNorms(_davit()))
    assert again.keys() == model.state_dict().keys() and (again["level_norms.2.weight"] == 3).all()

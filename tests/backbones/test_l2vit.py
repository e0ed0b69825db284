"""L2ViT: timm's conventions, its parameters, its alternating blocks, and the released names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attention
import backbones
from attention.dual_window_channel import DualBlock
from attention.linear_l2 import GlobalBlock
from backbones.l2vit import checkpoint_filter_fn
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions
from tests.parity.harness import case_paths, load_case

TINY: dict[str, Any] = {"depths": (2, 1, 1, 2), "dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 3)}


class TestL2ViT(Conventions):
    name = "l2vit_tiny"
    tiny: ClassVar[dict[str, Any]] = TINY

    @torch.no_grad()
    def test_the_published_size_gives_logits(self) -> None:
        model = backbones.create(self.name).eval()  # linear attention does not run on the meta device
        x = torch.randn(1, *model.pretrained_cfg["input_size"])
        assert model(x).shape == (1, 1000) and model.forward_features(x).shape == (1, 768, 7, 7)


@pytest.mark.parametrize(
    ("name", "millions"), [("l2vit_tiny", 29), ("l2vit_small", 50), ("l2vit_base", 89), ("l2vit_base_384", 89)]
)
def test_parameters_are_as_many_as_published(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = backbones.create(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_windows_and_linear_attention_alternate() -> None:
    with torch.device("meta"):
        model = backbones.create("l2vit_base_384")
    kinds = [type(block) for stage in model.stages for block in stage.blocks]
    assert kinds == [DualBlock, GlobalBlock] * 12
    assert {block.attn.window_size for stage in model.stages for block in stage.blocks[::2]} == {(12, 12)}
    assert {block.attn.floor for stage in model.stages for block in stage.blocks[1::2]} == {100.0}


def test_a_stages_attention_can_be_chosen() -> None:
    model = backbones.create("l2vit_tiny", attention=["softmax", None, None, "agent"], img_size=96, **TINY).eval()
    names = [[block.attn.name for block in stage.blocks] for stage in model.stages]
    assert names == [["softmax"] * 2, ["window"], ["window"], ["agent"] * 2]
    assert model(torch.randn(1, 3, 64, 90)).isfinite().all()


def official_shapes(depths: tuple[int, ...], dims: tuple[int, ...], heads: tuple[int, ...]) -> dict[str, Tensor]:
    """Names and shapes of the released models, written from their layout."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *weight: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]

    def batch_norm(name: str, dim: int) -> None:
        layer(name, dim)
        shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (dim,)
        shapes[f"{name}.num_batches_tracked"] = ()

    half = dims[0] // 2
    layer("downsample_layers.0.proj.proj.0", half, 3, 3, 3)
    batch_norm("downsample_layers.0.proj.proj.1", half)
    layer("downsample_layers.0.proj.proj.3", dims[0], half, 3, 3)
    batch_norm("downsample_layers.0.proj.proj.4", dims[0])
    layer("downsample_layers.0.norm", dims[0])
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        if i:
            layer(f"downsample_layers.{i}.norm", dims[i - 1])
            layer(f"downsample_layers.{i}.proj", dim, dims[i - 1], 2, 2)
        layer(f"norm{i}", dim)
        for index in range(depth):
            block = f"stages.{i}.{index}"
            for n in range(1 if index % 2 else 2):
                layer(f"{block}.cpe.{n}.proj", dim, 1, 3, 3)
            for n in (1, 2):
                layer(f"{block}.norm{n}", dim)
            layer(f"{block}.attn.qkv", 3 * dim, dim)
            layer(f"{block}.attn.proj", dim, dim)
            layer(f"{block}.mlp.fc1", 4 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 4 * dim)
            if index % 2:
                shapes[f"{block}.attn.temperature"] = (heads[i], 1, 1)
                layer(f"{block}.norm3", dim)
                for conv in ("conv1", "conv2"):
                    layer(f"{block}.local_mp.{conv}", dim, 1, 7, 7)
                batch_norm(f"{block}.local_mp.bn", dim)
    layer("norm", dims[-1])
    layer("head", 1000, dims[-1])
    return {f"module.{key}": torch.empty(shape, device="meta") for key, shape in shapes.items()}


def test_released_names_load_without_leftovers() -> None:
    with torch.device("meta"):
        model = backbones.create("l2vit_tiny")
    released = official_shapes((2, 2, 6, 2), (96, 192, 384, 768), (3, 6, 12, 24))
    renamed = checkpoint_filter_fn({"model": released}, model)
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert checkpoint_filter_fn(renamed, model).keys() == renamed.keys()


@torch.no_grad()
def test_linear_attention_is_that_of_the_released_code() -> None:
    case = load_case(case_paths()["attn_l2vit_linear_clamped"])
    model = backbones.create("l2vit_tiny", **TINY | {"dims": (16, 16, 16, 24), "num_heads": (2, 2, 2, 3)})
    attn = model.stages[0].blocks[1].attn.eval()
    attention.load_official(attn, case.state)
    torch.testing.assert_close(attn(case.inputs["x"]), case.expected["output.y"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"num_heads": (1, 2)}, "one positive entry"),
        ({"attention": ["window"] * 3}, "4 stages"),
        ({"window_size": 0}, "at least 1"),
    ],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("l2vit_tiny", **TINY | params)

"""Released names of networks that timm has."""

from __future__ import annotations

import timm
import torch
from torch import nn

import backbones
from backbones import checkpoints
from backbones.official_names import crossvit, davit, gcvit, to_timm


def _meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def test_crossvit_numbers_its_branches_by_a_dot() -> None:
    own = _meta("crossvit_tiny_240").state_dict()
    official = {
        key.replace("pos_embed_", "pos_embed.").replace("cls_token_", "cls_token."): value for key, value in own.items()
    }
    assert official.keys() != own.keys()
    assert to_timm({"model": official}).keys() == own.keys()
    assert crossvit(own).keys() == own.keys()


def test_davit_has_its_parts_under_other_names() -> None:
    own = _meta("davit_tiny").state_dict()
    state = {
        f"module.{key}": torch.empty(0)
        for key in (
            "patch_embeds.0.proj.weight",
            "patch_embeds.0.norm.bias",
            "patch_embeds.2.proj.bias",
            "main_blocks.2.1.0.cpe.0.proj.weight",
            "main_blocks.2.1.1.cpe.1.proj.bias",
            "norms.weight",
            "head.bias",
        )
    }
    renamed = to_timm({"state_dict": state})
    assert list(renamed) == [
        "stem.conv.weight",
        "stem.norm.bias",
        "stages.2.downsample.conv.bias",
        "stages.2.blocks.1.0.cpe1.proj.weight",
        "stages.2.blocks.1.1.cpe2.proj.bias",
        "head.norm.weight",
        "head.fc.bias",
    ]
    assert renamed.keys() <= own.keys()
    assert davit({"norm2.weight": torch.empty(0)}).keys() == {"level_norms.2.weight"}


def _official_gcvit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Timm's weights under the names of NVlabs/GCVit, written from its layout."""
    names = {
        ".conv_block.conv_dw": ".conv.0",
        ".conv_block.se.fc1": ".conv.2.fc.0",
        ".conv_block.se.fc2": ".conv.2.fc.2",
        ".conv_block.conv_pw": ".conv.3",
        ".conv_dw": ".conv.0",
        ".se.fc1": ".conv.2.fc.0",
        ".se.fc2": ".conv.2.fc.2",
        ".conv_pw": ".conv.3",
        ".ls1.gamma": ".gamma1",
        ".ls2.gamma": ".gamma2",
        "attn.rel_pos.": "attn.",
        "stem.conv1": "patch_embed.proj",
        "stem.down": "patch_embed.conv_down",
        "stages.3.norm": "norm",
        "head.fc": "head",
    }
    found = {}
    for key, value in state.items():
        squeezes = ".se.fc" in key
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        for i in range(4):
            key = key.replace(f"stages.{i}.downsample", f"levels.{i - 1}.downsample")
            for j in range(3):
                place = f"stages.{i}.global_block.blocks.conv{j + 1}"
                key = key.replace(place, f"levels.{i}.q_global_gen.to_q_global.{j}")
            key = key.replace(f"stages.{i}.", f"levels.{i}.")
        found[key] = value[:, :, 0, 0] if squeezes else value
        if key.endswith("relative_position_bias_table"):
            found[key.replace("bias_table", "index")] = torch.zeros(1)
    return found


def test_gcvit_has_its_parts_under_other_names_and_in_other_stages() -> None:
    for size in ("xxtiny", "small"):  # without and with layer scale
        own = _meta(f"gcvit_{size}").state_dict()
        # The index is computed on construction.
        own = {k: v for k, v in own.items() if not k.endswith("relative_position_index")}
        renamed = to_timm({"model": _official_gcvit(own)})
        assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in own.items()}
        assert to_timm(renamed).keys() == renamed.keys()
    assert gcvit({"norm3.bias": torch.empty(0)}).keys() == {"stages.3.norm.bias"}


def test_a_released_gcvit_is_read_from_a_file() -> None:
    first, second = (backbones.create("gcvit_xxtiny", num_classes=5, img_size=64).eval() for _ in range(2))
    checkpoints.load(second, _official_gcvit(first.state_dict()), "gcvit_xxtiny", "a file")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(second(x), first(x))

"""NiNformer: timm's conventions, other sizes, one norm for two branches."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import backbones
from kernels.errors import InputError
from tests.backbones.timm_conventions import Conventions

TINY: dict[str, Any] = {"depth": 4, "embed_dim": 16, "hidden_dim": 24}


class TestNiNformer(Conventions):
    name = "ninformer_patch4_32"
    tiny: ClassVar[dict[str, Any]] = TINY
    strides: ClassVar[tuple[int, ...]] = (4, 4, 4, 4)

    def test_the_published_size_gives_logits(self) -> None:
        with torch.device("meta"):
            model = backbones.create(self.name).eval()
        x = torch.empty(2, 3, 32, 32, device="meta")
        assert model(x).shape == (2, 10) and model.forward_features(x).shape == (2, 256, 8, 8)


def test_the_variant_is_that_of_the_table() -> None:
    with torch.device("meta"):
        model = backbones.create("ninformer_patch4_32")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 2.7
    assert len(model.blocks) == 4 and model.blocks[0].drop.p == 0.5
    assert not [name for name, _ in model.named_parameters() if name.startswith(("pos_embed", "norm"))]


def test_drop_path_leaves_whole_blocks_out() -> None:
    model = backbones.create("ninformer_patch4_32", drop_path_rate=0.999999, proj_drop_rate=0.0, **TINY).train()
    x = torch.randn(2, 3, 32, 32)
    first, *_, last = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(first, model.eval().forward_intermediates(x, indices=[0], intermediates_only=True)[0])
    assert not torch.allclose(last, model.forward_features(x))


def test_the_gating_unit_can_be_replaced() -> None:
    model = backbones.create("ninformer_patch4_32", attention="agent", num_heads=2, img_size=(32, 48), **TINY).eval()
    assert {block.mgu.input_size for block in model.blocks} == {(8, 12)}
    assert model(torch.randn(1, 3, 30, 50)).isfinite().all()


@pytest.mark.parametrize(
    ("params", "said"),
    [({"depth": 0}, "depth=0"), ({"proj_drop_rate": 1.0}, "dropout=1.0"), ({"img_size": (4, 4, 4)}, "img_size=")],
    ids=str,
)
def test_what_is_impossible_is_said_in_one_sentence(params: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        backbones.create("ninformer_patch4_32", **TINY | params)

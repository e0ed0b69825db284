"""timm's networks on the numbers they gave when the cases were made, and the papers' dense versions of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import backbones
from backbones.dense import LevelNorms, checkpoint_filter_fn
from backbones.official_names import to_timm
from tests.parity.harness import Case, adapter
from tests.parity.recipe import about, as_kept, recipe_inputs, recipe_state


@adapter("bb_timm_*")
def timm_model(case: Case) -> dict[str, Tensor]:
    call = re.match(r"timm\.create_model\('(\w+)'", about(case.name)["official_class"])
    assert call is not None
    model: Any = backbones.create(call[1], **case.config)
    _load(model, to_timm(recipe_state(case.name)))
    model.train(case.mode == "train")
    with torch.no_grad():
        _, maps = model.forward_intermediates(recipe_inputs(case.name)["x"], output_fmt="NCHW")
        outputs = {f"output.feat{i}": y for i, y in enumerate(maps)}
        features = model.forward_features(recipe_inputs(case.name)["x"])
        outputs["output.pre_logits"] = _joined(model.forward_head(features, pre_logits=True))
        outputs["output.logits"] = model.forward_head(features)
    return as_kept(outputs, case.expected)


def _joined(pre_logits: Tensor | list[Tensor]) -> Tensor:
    """CrossViT has pre-logits of two branches."""
    return pre_logits if isinstance(pre_logits, Tensor) else torch.cat(list(pre_logits), dim=1)


@adapter("bb_davit_dense_*")
def davit_dense(case: Case) -> dict[str, Tensor]:
    return _dense(case, LevelNorms(backbones.create("davit_tiny", **case.config)))


@adapter("bb_gcvit_dense_*")
def gcvit_dense(case: Case) -> dict[str, Tensor]:
    given = dict(case.config)
    given.pop("window_size_pre")
    # The image size is of account only for the halvings of the map for the query, which are given.
    model = backbones.create(
        "gcvit_any_xxtiny", embed_dim=given.pop("dim"), img_size=96, query_pools=(3, 2, 1, 0), **given
    )
    return _dense(case, LevelNorms(model, normed=[3]))


def _dense(case: Case, model: LevelNorms) -> dict[str, Tensor]:
    state, own = checkpoint_filter_fn(case.state, model), model.state_dict()
    for key, value in state.items():
        if ".se.fc" in key:
            # timm squeezes to no fewer than 8 channels, which only this case's widths need: those more of zero weight
            # have no bias and add nothing.
            outputs, inputs = own[key].shape[:2]
            state[key] = F.pad(value, (0, 0, 0, 0, 0, inputs - value.shape[1], 0, outputs - value.shape[0]))
    model.load_state_dict(state)
    model.train(case.mode == "train")
    with torch.no_grad():
        return {f"output.out{i}": y for i, y in enumerate(model(case.inputs["x"]))}


def _load(model: nn.Module, state: dict[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    computed = ("num_batches_tracked", "relative_position_index", "relative_coords_table")
    assert not unexpected and [key for key in missing if not key.endswith(computed)] == []

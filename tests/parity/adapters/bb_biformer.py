"""BiFormer against its released code: whole models, and the pyramid of its detectors and segmenters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import backbones
from backbones.biformer import checkpoint_filter_fn
from tests.parity.harness import Case, adapter
from tests.parity.recipe import as_kept, recipe_inputs, recipe_state


def _params(config: dict[str, Any]) -> dict[str, Any]:
    """Our parameters for those of the released classes."""
    sides = config.get("n_wins", config.get("n_win"))
    assert config["side_dwconv"] == 5 and config.get("before_attn_dwconv", 3) == 3
    return {
        "depths": config["depth"],
        "dims": config["embed_dim"],
        "head_dim": config["head_dim"],
        "mlp_ratio": config["mlp_ratios"],
        "regions": sides,
        "topk": [None if count < 0 else count for count in config["topks"]],
        "num_classes": config["num_classes"],
        "mlp_conv": config.get("mlp_dwconv", False),
        "layer_scale": value if (value := config.get("layer_scale_init_value", -1)) > 0 else None,
        "padding": "released" if config.get("auto_pad") else "error",
    }


def _load(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The counters of batch normalisation may be missing, as in files from before there were any."""
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(state, model), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    return model


@adapter("bb_biformer_micro*", "bb_biformer_stl_micro", "bb_biformer_stl_nchw_micro")
@torch.no_grad()
def classifier(case: Case) -> dict[str, Tensor]:
    name = case.name.removeprefix("bb_").partition("_micro")[0]
    name = "biformer_tiny" if name == "biformer" else name
    model = _load(backbones.create(name, **_params(case.config)), case.state)
    return _stages_and_logits(model.train(case.mode == "train"), case.inputs["x"])


@adapter("bb_biformer_stl_224")
@torch.no_grad()
def published_size(case: Case) -> dict[str, Tensor]:
    model = _load(backbones.create("biformer_stl"), recipe_state(case.name)).eval()
    return as_kept(_stages_and_logits(model, recipe_inputs(case.name)["x"]), case.expected)


@adapter("bb_biformer_mm_tiny_dense")
@torch.no_grad()
def dense(case: Case) -> dict[str, Tensor]:
    own = _params(case.config) | {"level_norms": True, "features_only": True}
    pyramid = backbones.create("biformer_tiny", **own).eval()
    _load(pyramid.model, recipe_state(case.name))
    maps = pyramid(recipe_inputs(case.name)["x"])
    return as_kept({f"output.out{i}": y for i, y in enumerate(maps)}, case.expected)


def _stages_and_logits(model: Any, x: Tensor) -> dict[str, Tensor]:
    final, maps = model.forward_intermediates(x)
    found = {f"output.stage{i + 1}": y for i, y in enumerate(maps)}
    return found | {"output.logits": model.forward_head(final)}

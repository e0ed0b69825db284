"""Dynamic Perceiver against its released code."""

from __future__ import annotations

import torch
from torch import Tensor

import backbones
from backbones.dynamic_perceiver import checkpoint_filter_fn
from tests.parity.harness import Case, adapter
from tests.parity.recipe import as_kept, recipe_inputs, recipe_state

EXITS = ("exit1_y_early3", "exit2_y_att", "exit3_y_cnn", "exit4_y_merge")


@adapter("bb_dynperceiver_reg400m_t32")
def dynamic_perceiver(case: Case) -> dict[str, Tensor]:
    model = backbones.create(
        "dynperceiver_reg400m_t32",
        depths=[n * f for n, f in zip((3, 3, 9, 3), case.config["depth_factor"], strict=True)],
    )
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn(recipe_state(case.name), model), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    model.train(case.mode == "train")
    with torch.no_grad():
        image = recipe_inputs(case.name)["x"]
        outputs = {f"output.{name}": y for name, y in zip(EXITS, model.forward_exits(image), strict=True)}
        torch.testing.assert_close(model(image), outputs["output.exit4_y_merge"])
    return as_kept(outputs, case.expected)

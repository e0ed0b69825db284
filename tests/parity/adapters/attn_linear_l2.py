"""L2ViT's linear attention, local concentration module and block, which take flattened maps in the released code."""

from __future__ import annotations

from torch import Tensor

import attention
from attention.linear_l2 import GlobalBlock, LocalConcentration
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


@adapter("attn_l2vit_linear", "attn_l2vit_linear_clamped")
def linear(case: Case) -> dict[str, Tensor]:
    return run_module(case, attention.create("linear_l2", **case.config))


@adapter("attn_l2vit_lcm")
def local(case: Case) -> dict[str, Tensor]:
    module = LocalConcentration(case.config["in_features"], case.config["kernel_size"])
    return run_module(case, module, before=lambda x: x.unflatten(1, (7, 11)), after=lambda y: y.flatten(1, 2))


@adapter("attn_l2vit_lga_block")
def block(case: Case) -> dict[str, Tensor]:
    module = GlobalBlock(case.config["dim"], case.config["num_heads"])
    return run_module(case, module, before=lambda x: x.unflatten(1, (8, 10)), after=lambda y: y.flatten(1, 2))

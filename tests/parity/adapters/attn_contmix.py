"""ContMix's block, its parts, and the reparameterised kernel."""

from __future__ import annotations

import torch
from torch import Tensor

import attention
from attention.contmix_block import ContMixBlock
from attention.dilated_reparam import DilatedReparam
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


def _block(case: Case) -> ContMixBlock:
    config = {key: value for key, value in case.config.items() if key != "use_gemm"}
    return ContMixBlock(config.pop("dim"), config.pop("num_heads"), **config)


@adapter("attn_contmix", "attn_contmix_scale", "attn_contmix_smallmap", "bb_contmix_block", "bb_contmix_block_small")
def block(case: Case) -> dict[str, Tensor]:
    module = _block(case)
    names = {name: name.removeprefix("mixer.") for name, _ in module.named_parameters()}
    found = run_module(case, module, names=names)
    mixer = module.mixer
    x = module.norm1(module.dwconv1(case.inputs["x"]))
    source, _ = mixer.fitted(x)
    found["output.value"] = mixer.value(source)
    found["output.logits"] = mixer.logits(source).flatten(2, 3).permute(0, 3, 1, 2)
    found["output.mixed"] = mixer.mixed(x)
    return found


@adapter("attn_contmix_reparam", "bb_dilated_reparam_k13")
def reparam(case: Case) -> dict[str, Tensor]:
    module = DilatedReparam(case.config["channels"], case.config["kernel_size"])
    case.state = {key.removeprefix("blk."): value for key, value in case.state.items()}
    attention.load_official(module, case.state)
    weight, bias = module.eval().kernel()
    out = module(case.inputs["x"])
    torch.testing.assert_close(module.merge()(case.inputs["x"]), out)
    return {"output.y": out, "output.merged_weight": weight, "output.merged_bias": bias}

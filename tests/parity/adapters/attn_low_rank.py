"""LAMA's pooling; the case is a padded batch, ours a packed one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention.low_rank import LowRankPool
from tests.parity.harness import Case, adapter


@adapter("attn_lama")
def lama(case: Case) -> dict[str, Tensor]:
    pool = LowRankPool(case.config["dim"], case.config["num_heads"])
    attention.load_official(pool, case.state)
    mask = case.inputs["mask"].bool()
    x = case.inputs["x"].clone().requires_grad_()
    cuts = F.pad(mask.sum(1).cumsum(0), (1, 0))
    sums, packed, _ = pool(x[mask], cuts)
    weights = torch.zeros(*mask.shape, len(packed)).index_put(mask.nonzero(as_tuple=True), packed.t())
    leaves = {"x": x, "p": pool.p, "q": pool.q}
    gradients = torch.autograd.grad(sums, list(leaves.values()), case.inputs["grad_out"])
    found = {"output.y": sums, "output.w": weights.mT}
    return found | {f"grad.{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}

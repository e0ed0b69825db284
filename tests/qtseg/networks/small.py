"""Small networks and images for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.qtseg.networks.build import build_network
from tests.backbones.small import small_params

QTSEG: dict[str, Any] = {"name": "qtseg", "width": 4, "num_heads": 4, "depths": [1, 1, 2], "mlp_dim": 16}
UNET: dict[str, Any] = {"name": "unet", "width": 4}
SELF_GUIDED: dict[str, Any] = {"name": "self_guided", "width": 8}
ODD = (45, 75)


def build(decoder: dict[str, Any] | str, backbone: str | None = None, **settings: Any) -> nn.Module:
    """A network with a small backbone, every branch of which counts."""
    chosen = None if backbone is None else {"name": backbone, "params": small_params(backbone)}
    return awake(build_network({"decoder": decoder, "backbone": chosen, **settings}))


@torch.no_grad()
def awake(network: nn.Module) -> nn.Module:
    """Attention that starts at nothing, and statistics of batches as they are after some training."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if name.endswith("gamma"):
            tensor.fill_(0.5)
        elif name.endswith(("running_mean", "norm.bias")):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return network


def images(size: tuple[int, int] = ODD, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def unreached(network: nn.Module) -> list[str]:
    """Names of the parameters without a gradient."""
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def released_keys(name: str) -> dict[str, Tensor]:
    """Names and shapes of a full-size released checkpoint, beside a development checkout; skipped elsewhere."""
    path = Path(__file__).parents[4] / "shared" / "specs" / "segmentation_state_dicts.json"
    if not path.is_file():
        pytest.skip("the lists of released names are not beside this checkout")
    keys = json.loads(path.read_text())[name]["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}

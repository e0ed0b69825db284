"""MaxViT's block and grid attention within its transformer block, in both dialects."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attention
from tests.parity.adapters.attn_module import run_module
from tests.parity.harness import Case, adapter


class _Block(nn.Module):
    """Attention and a two-layer network, each behind a norm and a residual with a scale of its own."""

    def __init__(self, dim: int, partition: str, settings: dict) -> None:
        super().__init__()
        eps, hidden = settings.get("norm_eps", 1e-6), int(dim * settings["expand_ratio"])
        self.attn = attention.create(
            partition,
            dim=dim,
            num_heads=dim // settings["dim_head"],
            window_size=tuple(settings["window_size"]),
            dialect="tf" if settings["rel_pos_type"] == "bias_tf" else "torch",
        )
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = nn.GELU(approximate="tanh" if settings.get("act_layer") == "gelu_tanh" else "none")
        start = settings.get("init_values")
        self.gamma1 = self.gamma2 = None
        if start is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(torch.full((dim,), start)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        step = self.attn(self.norm1(x))
        x = x + (step if self.gamma1 is None else step * self.gamma1)
        step = self.fc2(self.activation(self.fc1(self.norm2(x))))
        return x + (step if self.gamma2 is None else step * self.gamma2)

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        inner = {key.removeprefix("attn."): value for key, value in state.items() if key.startswith("attn.")}
        renamed = {f"attn.{key}": value for key, value in self.attn.checkpoint_filter(inner).items()}
        official = {name: ours for ours, name in NAMES.items()}
        return renamed | {official.get(k, k): v for k, v in state.items() if not k.startswith("attn.")}


NAMES = {
    "gamma1": "ls1.gamma",
    "gamma2": "ls2.gamma",
    **{f"{layer}.{part}": f"mlp.{layer}.{part}" for layer in ("fc1", "fc2") for part in ("weight", "bias")},
    "attn.relative_position_bias_table": "attn.rel_pos.relative_position_bias_table",
}


@adapter("attn_maxvit_*")
def max_vit(case: Case) -> dict[str, Tensor]:
    config = case.config
    return run_module(case, _Block(config["dim"], config["partition_type"], config["cfg"]), names=NAMES)

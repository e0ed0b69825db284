"""GC ViT's network for detection and segmentation, composed around its attention: one query per stage, odd maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import attention
from attention.global_context import GlobalContextAttention, GlobalQueryGenerator
from tests.parity.harness import Case, adapter


@adapter("bb_gcvit_dense_micro")
@torch.no_grad()
def dense(case: Case) -> dict[str, Tensor]:
    network = _Network(case)
    x = case.inputs["x"]
    x = F.conv2d(x, case.state["patch_embed.proj.weight"], case.state["patch_embed.proj.bias"], 2, 1)
    x = network.down(x.permute(0, 2, 3, 1), "patch_embed.conv_down.")
    found = {}
    for level, depth in enumerate(case.config["depths"]):
        query = network.query(x, level)
        for block in range(depth):
            x = network.block(x, query, level, block)
        found[f"output.out{level}"] = network.norm(x, f"norm{level}").permute(0, 3, 1, 2)
        if level < 3:
            x = network.down(x, f"levels.{level}.downsample.")
    return found


class _Network:
    """The steps of the network on maps (B, H, W, C), with the case's weights."""

    def __init__(self, case: Case) -> None:
        self.state, self.config = case.state, case.config

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.state.items() if key.startswith(prefix)}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def down(self, x: Tensor, prefix: str) -> Tensor:
        """A gated convolution, as in the generator of queries, and one of stride 2 between two norms."""
        x = self.norm(x, f"{prefix}norm1")
        conv = GlobalQueryGenerator(x.shape[-1], x.shape[1:3], 0).eval()
        conv.load_state_dict(
            conv.checkpoint_filter(
                {f"to_q_global.0.{key}": v for key, v in self.part(prefix).items() if key.startswith("conv.")}
            )
        )
        x = F.conv2d(conv(x).permute(0, 3, 1, 2), self.state[f"{prefix}reduction.weight"], None, 2, 1)
        return self.norm(x.permute(0, 2, 3, 1), f"{prefix}norm2")

    def query(self, x: Tensor, level: int) -> Tensor:
        side = self.config["window_size"][level]
        generator = GlobalQueryGenerator(x.shape[-1], (side, side), (3, 2, 1, 0)[level]).eval()
        attention.load_official(generator, self.part(f"levels.{level}.q_global_gen."))
        return generator(x)

    def block(self, x: Tensor, query: Tensor, level: int, index: int) -> Tensor:
        prefix = f"levels.{level}.blocks.{index}."
        params = {
            "dim": x.shape[-1],
            "num_heads": self.config["num_heads"][level],
            "window_size": self.config["window_size"][level],
            "own_query": False,
            "padding": "released",
        }
        module = attention.create("global_context", **GlobalContextAttention.for_block(params, index)).eval()
        assert isinstance(module, GlobalContextAttention)
        attention.load_official(module, self.part(f"{prefix}attn."))
        normed = self.norm(x, f"{prefix}norm1")
        mixed = module.with_query(normed, query) if module.form == "global" else module(normed)
        x = x + self.state[f"{prefix}gamma1"] * mixed
        layers = [(self.state[f"{prefix}mlp.fc{n}.weight"], self.state[f"{prefix}mlp.fc{n}.bias"]) for n in (1, 2)]
        hidden = F.gelu(F.linear(self.norm(x, f"{prefix}norm2"), *layers[0]))
        return x + self.state[f"{prefix}gamma2"] * F.linear(hidden, *layers[1])

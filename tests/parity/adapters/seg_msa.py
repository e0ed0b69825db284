"""Multi-scale self-guided attention, whole behind its encoder and in parts, from the released code's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tasks.qtseg.networks.self_guided import MultiConv, SelfGuided, SemanticAutoencoder
from tests.parity.harness import Case, adapter

_COMPLETE = {"fuse1.fuse_attn.0.weight": torch.empty(0)}


class Given(nn.Module):
    """An encoder whose maps are the case's inputs."""

    strides = (4, 8, 16, 32)

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps
        self.channels = tuple(y.shape[1] for y in maps)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.maps


def _network(case: Case) -> SelfGuided:
    encoder = Given([case.inputs[f"f{i}"] for i in range(1, 5)])
    width = case.state["down1.0.weight"].shape[0]
    network = SelfGuided(encoder, case.config["classes"], width=width)
    network.load_state_dict(SelfGuided.checkpoint_filter(case.state))
    return network


@adapter("seg_msa_stacked_head_eval")
def evaluated(case: Case) -> dict[str, Tensor]:
    return {"output.out": _network(case).eval()(case.inputs["image"])}


@adapter("seg_msa_stacked_head_train")
def trained(case: Case) -> dict[str, Tensor]:
    network, image = _network(case).train(), case.inputs["image"]
    trace = network.trace(image)
    levels, losses = network.forward_training(image)
    # Codes are told from the coarsest scale to the finest, both steps of each.
    codes = [trace.codes[step][scale].flatten() for scale in (3, 2, 1, 0) for step in (0, 1)]
    found = [*codes, *trace.seen[0], *trace.seen[1], *trace.rebuilt[0], *trace.rebuilt[1], *levels[4:], *levels[:4]]
    guided = sum((a - b).square().mean() for a, b in zip(codes[::2], codes[1::2], strict=True))
    pairs = [pair for step in (0, 1) for pair in zip(trace.seen[step], trace.rebuilt[step], strict=True)]
    rebuilt = sum((a - b).square().mean() for a, b in pairs)
    torch.testing.assert_close(losses["guided"], 0.25 * guided)
    torch.testing.assert_close(losses["rebuilt"], 0.1 * rebuilt)
    return {f"output.o{i:02d}": value for i, value in enumerate(found)}


@adapter("seg_msa_semantic_module")
def semantic(case: Case) -> dict[str, Tensor]:
    module = SemanticAutoencoder(case.config["in_dim"])
    _load(module, case, "semanticModule_1_1.", "steps.0.semantic.")
    code, rebuilt = module.eval()(case.inputs["x"])
    return {"output.vec": code.flatten(), "output.rec": rebuilt}


@adapter("seg_msa_multiconv_softmax")
def multi_conv(case: Case) -> dict[str, Tensor]:
    module = MultiConv(case.config["in_ch"], case.config["out_ch"], shares=case.config["attn"])
    _load(module, case, "fuse1.", "fuse.")
    return {"output.out": module.eval()(case.inputs["x"])}


def _load(module: nn.Module, case: Case, official: str, ours: str) -> None:
    named: dict[str, Any] = _COMPLETE | {official + key: value for key, value in case.state.items()}
    state = SelfGuided.checkpoint_filter(named)
    module.load_state_dict(
        {key.removeprefix(ours): v for key, v in state.items() if key.startswith(ours) and v.shape != (0,)}
    )

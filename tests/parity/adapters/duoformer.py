"""DuoFormer's parts against their released code."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.duoformer_parts import ConvStack, TwoAttentions, group, ungroup
from tests.parity.harness import Case, adapter

GRID = (7, 7)


@adapter("duoformer_tokens")
def tokens(case: Case) -> dict[str, Tensor]:
    maps = [case.inputs[f"p{stage}"] for stage in range(4)]
    groups = [group(map_, GRID) for map_ in maps]
    for map_, grouped in zip(maps, groups, strict=True):
        torch.testing.assert_close(ungroup(grouped, GRID), map_)
    found = {"output.tokens": torch.cat(groups[::-1], dim=2)}
    for stage, map_ in enumerate(maps):
        places = torch.arange(map_.shape[2] * map_.shape[3]).view(1, 1, *map_.shape[2:])
        found[f"output.index{stage}"] = group(places, GRID)[0, :, :, 0]
    return found


@adapter("duoformer_scale_token")
@torch.no_grad()
def scale_token(case: Case) -> dict[str, Tensor]:
    stack = ConvStack(case.config["in_channels"], case.config["out_channels"], case.config["n_conv"])
    state = {}
    for key, value in case.state.items():
        _, index, layer, leaf = key.split(".")
        state[f"{3 * int(index) + (layer == 'norm')}.{leaf}"] = value
    stack.load_state_dict(state)
    flat = stack.train(case.mode == "train")(case.inputs["x"]).flatten(2)
    return {"output.flat": flat, "output.scale_tokens": flat.transpose(1, 2)[:, :, None]}


@adapter("duoformer_scale3", "duoformer_attn_drop_qknorm", "duoformer_vit")
@torch.no_grad()
def two_attentions(case: Case) -> dict[str, Tensor]:
    config, x = case.config, case.inputs["x"]
    model = TwoAttentions(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        x.shape[2],
        GRID,
        form="vit" if "model_type" in config else "plain",
        qk_norm=config.get("attn_drop_rate", 0) > 0,
        layer_scale=config.get("init_values"),
    )
    model.load_state_dict(model.checkpoint_filter(case.state))
    model.train(case.mode == "train")
    head = nn.Linear(config["embed_dim"], config["num_classes"])
    head.load_state_dict({leaf: case.state[f"head.{leaf}"] for leaf in ("weight", "bias")})
    scales = model.between_scales(x)
    patches = model.between_patches(scales[:, :, 0], GRID)
    found = {"output.logits": head(patches[:, 0])}
    if "output.patch_out" in case.expected:
        found |= {"output.scale_out_token0": scales[:, :, 0], "output.patch_out": patches}
    return found

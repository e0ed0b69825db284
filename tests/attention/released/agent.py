"""Both attention matrices with biases repeated over the batch, on maps of the tables' size."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.agent import AgentAttention


def released(module: AgentAttention) -> Callable[[Tensor], Tensor]:
    heads = module.num_heads

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tables = module.bias
        n = tables.an_bias.shape[1]
        qkv = module.qkv(x.reshape(batch, -1, dim)).reshape(batch, -1, 3, dim).permute(2, 0, 1, 3)
        q, k, v = qkv.unbind(0)

        def split(t: Tensor) -> Tensor:
            return t.reshape(batch, -1, heads, dim // heads).permute(0, 2, 1, 3)

        def coarse(table: Tensor) -> Tensor:
            resized = F.interpolate(table, size=(height, width), mode="bilinear")
            return resized.reshape(1, heads, n, -1).repeat(batch, 1, 1, 1)

        side = int(n**0.5)
        agents = F.adaptive_avg_pool2d(q.reshape(batch, height, width, dim).permute(0, 3, 1, 2), (side, side))
        agents = split(agents.reshape(batch, dim, -1).permute(0, 2, 1))
        lines = (tables.ah_bias + tables.aw_bias).reshape(1, heads, n, -1).repeat(batch, 1, 1, 1)
        scores = (agents * module.scale) @ split(k).transpose(-2, -1) + coarse(tables.an_bias) + lines
        gathered = scores.softmax(-1) @ split(v)
        lines = (tables.ha_bias + tables.wa_bias).reshape(1, heads, -1, n).repeat(batch, 1, 1, 1)
        scores = (split(q) * module.scale) @ agents.transpose(-2, -1)
        scores = scores + coarse(tables.na_bias).permute(0, 1, 3, 2) + lines
        out = (scores.softmax(-1) @ gathered).transpose(1, 2).reshape(batch, -1, dim)
        local = module.dwc(v.reshape(batch, height, width, dim).permute(0, 3, 1, 2))
        out = out + local.permute(0, 2, 3, 1).reshape(batch, -1, dim)
        return module.proj(out).reshape(x.shape)

    return run

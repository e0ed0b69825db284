"""Dynamic mask attention with the scores of all pairs, those of dropped keys set to -inf."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.dynamic_mask import DynamicMaskAttention


def released(module: DynamicMaskAttention) -> Callable[[Tensor], Tensor]:
    groups = module.num_kv_heads

    def run(x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(1, -2)
        batch, tokens, _ = x.shape
        q = module.q_norm(module.q_proj(x).reshape(batch, tokens, module.num_heads, -1)).transpose(1, 2)
        k = module.k_norm(module.k_proj(x).reshape(batch, tokens, groups, -1)).transpose(1, 2)
        v = module.v_proj(x).reshape(batch, tokens, groups, -1).transpose(1, 2)
        steps = module.dt_proj(v.transpose(1, 2).reshape(batch, tokens, -1))
        bias = (module.A * F.softplus(steps)).transpose(1, 2)[:, :, None].expand(-1, -1, tokens, -1)
        if module.causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        if module.window < tokens:
            least = bias.detach().topk(module.window, dim=-1).values[..., -1:]
            bias = bias.masked_fill(bias < least, -torch.inf)
        k, v, bias = (t.repeat_interleave(module.num_heads // groups, dim=1) for t in (k, v, bias))
        weights = (q @ k.transpose(-2, -1) * module.head_dim**-0.5 + bias).softmax(-1)
        return module.o_proj((weights @ v).transpose(1, 2).reshape(shape))

    return run

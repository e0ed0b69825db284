"""All heads with their matrices of tokens by tokens, the bias looked up by an index table of unique offsets."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.moh import MixtureOfHeadAttention


def released(module: MixtureOfHeadAttention) -> Callable[[Tensor], Tensor]:
    height, width = module.input_size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], -1).float()
    offsets = (places[:, None] - places[None]) / torch.tensor([height - 1, width - 1]) * 8
    table, index = torch.unique(offsets.view(-1, 2), return_inverse=True, dim=0)
    table = torch.sign(table) * torch.log2(table.abs() + 1) / math.log2(8)
    heads, shared, routed = module.num_heads, module.shared_heads, module.routed_heads

    def run(x: Tensor) -> Tensor:
        batch, _, _, dim = x.shape
        tokens = x.reshape(batch, -1, dim)
        n = tokens.shape[1]
        qkv = module.qkv(tokens).reshape(batch, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q = F.normalize(q, dim=-1) + module.query_embedding
        scores = F.softplus(module.temperature) * math.log(n) * q @ F.normalize(k, dim=-1).transpose(-2, -1)
        offset = module.cpb_fc2(F.relu(module.cpb_fc1(table.to(x))))
        scores = scores + offset.transpose(0, 1)[:, index.to(x.device)].view(-1, n, n)
        out = (scores.softmax(-1) @ v).transpose(1, 2)
        gates = x.new_ones(batch, n, shared)
        if shared > 1:
            gates = module.wg_1(tokens).softmax(-1) * shared
        if routed:
            router = module.wg(tokens).softmax(-1)
            kept = router * F.one_hot(router.topk(routed, -1).indices, heads - shared).sum(-2)
            kept = kept / kept.sum(-1, keepdim=True) * routed
            if shared:
                shares = module.wg_0(tokens).softmax(-1) * 2
                gates, kept = gates * shares[..., :1], kept * shares[..., 1:]
            gates = torch.cat([gates, kept], -1)
        return module.proj((out * gates[..., None]).reshape(batch, n, dim)).reshape(x.shape)

    return run

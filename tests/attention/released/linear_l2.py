"""Features and products written out, heads first, as in the code of L2ViT."""

from collections.abc import Callable

from torch import Tensor

from attention.linear_l2 import LinearGlobalAttention


def released(module: LinearGlobalAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        batch, *grid, dim = x.shape
        qkv = module.qkv(x.reshape(batch, -1, dim)).reshape(batch, -1, 3, module.num_heads, module.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = q.relu(), k.relu()
        normaliser = (q @ k.sum(2, keepdim=True).transpose(-2, -1)).clamp(min=module.floor)
        out = q @ ((k.transpose(-2, -1) @ v) * module.temperature) / normaliser
        return module.proj(out.transpose(1, 2).reshape(batch, *grid, dim))

    return run

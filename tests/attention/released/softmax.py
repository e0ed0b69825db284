"""Attention with its matrix of tokens by tokens, as in the first vision transformers."""

from collections.abc import Callable

from torch import Tensor

from attention.softmax import SoftmaxAttention


def released(module: SoftmaxAttention) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        batch, *grid, dim = x.shape
        qkv = module.qkv(x.flatten(1, -2)).reshape(batch, -1, 3, module.num_heads, module.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = ((q * module.head_dim**-0.5) @ k.transpose(-2, -1)).softmax(-1)
        return module.proj((attention @ v).transpose(1, 2).reshape(batch, *grid, dim))

    return run

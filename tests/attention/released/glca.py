"""Global-local cross attention by the paper's formula, with its matrix of weights."""

from collections.abc import Callable

from torch import Tensor

from attention.dcal import GlobalLocalCrossAttention, PairwiseCrossAttention


def released(module: GlobalLocalCrossAttention | PairwiseCrossAttention) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

        wanted = module.qkv(q)[..., : module.dim]
        k, v = module.qkv(kv)[..., module.dim :].chunk(2, dim=-1)
        weights = (heads(wanted) @ heads(k).transpose(-2, -1) * module.head_dim**-0.5).softmax(-1)
        return module.proj((weights @ heads(v)).transpose(1, 2).flatten(2))

    return run

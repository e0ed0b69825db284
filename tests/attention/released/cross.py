"""Cross attention with its matrix of queries by tokens."""

from collections.abc import Callable

from torch import Tensor

from attention.softmax_cross import SoftmaxCross


def released(module: SoftmaxCross) -> Callable[[Tensor, Tensor], Tensor]:
    def run(q: Tensor, kv: Tensor) -> Tensor:
        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], module.num_heads, -1).transpose(1, 2)

        k, v = module.kv(kv).chunk(2, dim=-1)
        attention = (heads(module.q(q)) * module.head_dim**-0.5 @ heads(k).transpose(-2, -1)).softmax(-1)
        return module.proj((attention @ heads(v)).transpose(1, 2).flatten(2))

    return run

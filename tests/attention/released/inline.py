"""Features, states and means one after the other, and a grouped convolution, as in InLine's code for Swin."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.inline import InLineAttention


def released(module: InLineAttention) -> Callable[[Tensor], Tensor]:
    features: Callable[[Tensor], Tensor] = {
        "identity": lambda z: z,
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "exp": lambda z: (0.2 * z).exp(),
    }[module.phi]

    def run(x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        tokens = height * width
        x = x.reshape(batch, tokens, dim)
        q, k, v = module.qkv(x).reshape(batch, tokens, 3, dim).permute(2, 0, 1, 3).unbind(0)
        q, k = features(q), features(k)

        def heads(z: Tensor) -> Tensor:
            return z.reshape(batch, tokens, module.num_heads, -1).permute(0, 2, 1, 3)

        q, k, values = heads(q), heads(k), heads(v)
        share = (module.head_dim**-0.5 / tokens) ** 0.5
        state = (k.transpose(-2, -1) * share) @ (values * share)
        sums = q @ k.mean(2, keepdim=True).transpose(-2, -1) * module.head_dim**-0.5
        out = q @ state + (1 - sums) * values.mean(2, keepdim=True)
        out = out.transpose(1, 2).reshape(batch, tokens, dim)
        maps = v.transpose(1, 2).reshape(1, batch * dim, height, width)
        assert module.residual is not None
        kernels = module.residual(x.mean(1)[..., None]).reshape(batch * dim, 1, 3, 3)
        local = F.conv2d(maps, kernels, padding=1, groups=batch * dim)
        out = out + local.reshape(batch, dim, tokens).transpose(1, 2)
        return module.proj(out).reshape(batch, height, width, dim)

    return run

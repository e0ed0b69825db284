"""The gating unit with the MLP-Mixer on transposed copies of the tokens."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from attention.ninformer import NiNformerGating


def released(module: NiNformerGating) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        u = x.flatten(1, -2)
        tokens = module.token_norm(u).transpose(1, 2).contiguous()
        tokens = module.token_fc2(F.gelu(module.token_fc1(tokens)))
        mixed = u + tokens.transpose(1, 2).contiguous()
        mixed = mixed + module.channel_fc2(F.gelu(module.channel_fc1(module.channel_norm(mixed))))
        return (module.proj(u) * mixed).view(x.shape)

    return run

"""Window attention by extending, rolling and rearranging the map, in plain PyTorch: the definition of correct."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.window_attention.geometry import RELEASED_MASK


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    grid: bool,
    shift: list[int],
    released: bool,
    hide: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, W, heads, E) and log-sum-exp (B, H, W, heads)."""
    precise = torch.promote_types(q.dtype, torch.float32)
    height, width = q.shape[1:3]
    padded = [-(-height // window[0]) * window[0], -(-width // window[1]) * window[1]]

    def split(x: Tensor) -> Tensor:
        """(B, H, W, heads, C) to (B, windows, heads, tokens, C)."""
        x = F.pad(x, (0, 0, 0, 0, 0, padded[1] - width, 0, padded[0] - height))
        return cut(x.roll((-shift[0], -shift[1]), (1, 2)))

    def cut(x: Tensor) -> Tensor:
        counts = [padded[0] // window[0], padded[1] // window[1]]
        if grid:
            x = x.unflatten(2, (window[1], counts[1])).unflatten(1, (window[0], counts[0]))
            x = x.permute(0, 2, 4, 5, 1, 3, 6)
        else:
            x = x.unflatten(2, (counts[1], window[1])).unflatten(1, (counts[0], window[0]))
            x = x.permute(0, 1, 3, 5, 2, 4, 6)
        return x.flatten(4, 5).flatten(1, 2)

    def join(x: Tensor) -> Tensor:
        """The reverse of ``split``."""
        counts = [padded[0] // window[0], padded[1] // window[1]]
        x = x.unflatten(3, window).unflatten(1, counts)
        x = x.permute(0, 4, 1, 5, 2, 3, 6) if grid else x.permute(0, 1, 4, 2, 5, 3, 6)
        x = x.flatten(3, 4).flatten(1, 2).roll((shift[0], shift[1]), (1, 2))
        return x[:, :height, :width]

    scores = split(q.to(precise)) @ split(k.to(precise)).mT * scale
    if bias is not None:
        scores = scores + bias
    y, x = (torch.arange(n, device=q.device) for n in padded)
    side = 2 * (y >= padded[0] - shift[0])[:, None] + (x >= padded[1] - shift[1])
    side = cut(side[None, :, :, None, None])[..., 0]  # the map is rolled already
    apart = side[..., :, None] != side[..., None, :]
    scores = scores + RELEASED_MASK * apart if released else scores.masked_fill(apart, -torch.inf)
    if hide:
        real = split(torch.ones_like(q[:1, :, :, :1, :1], dtype=torch.bool))[..., 0]
        scores = scores.masked_fill(~real[..., None, :], -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    # Rows without a key: a softmax of zeros that counts for nothing keeps NaN out of the gradients as well.
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
    return join(weights @ split(v.to(precise))).to(q.dtype), join(lse)[..., 0]

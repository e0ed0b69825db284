"""EcoFormer attention: queries and keys become binary codes, compared by linear attention.

Source: Liu et al., EcoFormer: Energy-Saving Attention with Linear Complexity, NeurIPS 2022, arXiv 2209.09004. With
``form="released"`` the numerator has the value of the token itself where the formula has the sum of all values, as in
the released code that checkpoints were trained with; ``form="corrected"`` is the formula. The hash functions are
learned by :meth:`EcoFormerAttention.learn`. Of this the authors give anchors, steps, rate and targets; the start of
each function, the loss and the order of bits are those of supervised hashing with kernels (Liu et al., CVPR 2012),
chosen here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise, linear_attention, projection
from attention.layout import split_heads, weights_of
from attention.mixer import Mixer
from attention.parameters import Probability
from attention.registry import register
from kernels.errors import InputError, unknown_name
from kernels.linear_attention import linear_attention_2pass
from kernels.operators import precisely

FORMS = ("released", "corrected")
NEIGHBOURS = 10  # most and least similar tokens that codes are learned from
STEPS = 100
RATE = 5e-4


@register("ecoformer", kind="mixer")
class EcoFormerAttention(Mixer):
    """Linear attention of binary codes from learned hash functions (EcoFormer, Liu et al. 2022).

    A token's query, which is its key too, has a code c of plus and minus ones. Tokens are as similar as
    ``c_i . c_j + bits + 1``; the weights are similarities divided by their sum. The gradient of a sign is passed
    straight through where its argument is between -1 and 1.

    Hash functions are random until :meth:`learn` or a checkpoint replaces them.

    Args:
        dim: channels C.
        num_heads: heads.
        form: ``"released"``: the constant ``bits + 1`` weighs the token's own value in the numerator, and all tokens
            in the denominator. ``"corrected"``: all tokens in both, so that weights sum to 1.
        bits: of a code.
        anchors: tokens that others are compared to by the hash functions.
        seed: of the random functions.
        qkv_bias: whether the projections to queries and values have a bias.
        proj_drop: dropout on the output while training.

    Raises:
        InputError: an unknown form, or numbers below 1.
    """

    about = About("Liu et al. (EcoFormer), NeurIPS 2022, 2209.09004", "O(N)", "linear_attention_2pass", "Apache-2.0")
    grids = (1, 2, 3)
    rows_sum_to_one = False
    takes_choices = True
    exact_gradient = False

    def __init__(
        self,
        dim: int,
        num_heads: int,
        form: str = "released",
        bits: int = 16,
        anchors: int = 25,
        seed: int = 0,
        qkv_bias: bool = True,
        proj_drop: Probability = 0.0,
    ) -> None:
        super().__init__(dim, num_heads)
        if form not in FORMS:
            raise unknown_name("attention.form", form, FORMS)
        if bits < 1 or anchors < 1:
            raise InputError(f"attention 'ecoformer': bits={bits} and anchors={anchors} must be at least 1.")
        self.form = form
        self.to_qk = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.hash = KernelHash(num_heads, self.head_dim, bits, anchors, seed)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        codes, v = self._codes(x, mask), split_heads(self.to_v(x.flatten(1, -2)), self.num_heads)
        return self.proj_drop(self.proj(self._core(codes, v, mask).flatten(2))).view(x.shape)

    def weights(self, x: Tensor, mask: Tensor | None) -> Tensor:
        codes, v = self._codes(x, mask), split_heads(self.to_v(x.flatten(1, -2)), self.num_heads)
        return weights_of(lambda values: self._core(codes, values, mask), v)

    def _codes(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, heads, bits)."""
        qk = split_heads(self.to_qk(x.flatten(1, -2)), self.num_heads)
        return self.hash(qk, None if mask is None else mask.flatten(1))

    def _core(self, codes: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, heads, E) from codes in float32."""
        constant = codes.shape[-1] + 1
        real = None if mask is None else mask.flatten(1)
        low = codes.to(v.dtype)  # ones have no digits to lose
        similar = linear_attention_2pass(
            low,
            low,
            v,
            normaliser="none",
            feature_map="identity",
            key_weight=None if real is None else real[..., None],
        )
        with precisely(v):
            if real is None:
                total, count = codes.sum(1), codes.new_full((codes.shape[0], 1, 1), codes.shape[1])
            else:
                total = codes.masked_fill(~real[..., None, None], 0).sum(1)
                count = real.sum(1)[:, None, None].to(codes.dtype)
            # Each real key adds at least 1, so that the bound changes nothing unless there is none.
            normaliser = (torch.einsum("bnhk,bhk->bnh", codes, total) + constant * count).clamp_min(1)
            values = v.to(codes.dtype)
            if self.form == "corrected":
                values = values if real is None else values.masked_fill(~real[..., None, None], 0)
                values = values.sum(1, keepdim=True)
            out = (similar.to(codes.dtype) + constant * values) / normaliser[..., None]
        return out.to(v.dtype)

    def learn(self, x: Tensor, mask: Tensor | None = None, seed: int = 0) -> None:
        """Learn the hash functions from the first item of a first batch, for good.

        They are to give tokens the codes that tell each one's most similar from its least similar others; see
        :meth:`KernelHash.learn`. The projections are as they are at the time.

        Args:
            x: (B, *grid, C), the input of this module.
            mask: (B, *grid), true for real tokens.
            seed: of the choice of anchors.

        Raises:
            InputError: shapes do not fit, or there is no real token.
        """
        self._check(x, mask)
        tokens = x[0].flatten(0, -2) if mask is None else x[0][mask[0]]
        if len(tokens) == 0:
            raise InputError("attention 'ecoformer': the first item has no real token to learn hash functions from.")
        with torch.no_grad():
            self.hash.learn(split_heads(self.to_qk(tokens), self.num_heads), seed)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        tokens = math.prod(shape)
        heads, bits, anchors = self.hash.A.shape
        features = 2 * tokens * heads * anchors * (self.head_dim + bits)
        return [
            projection("q, k, v", tokens, self.dim, 2 * self.dim),
            Part("codes", features, tokens * (self.dim + heads * bits)),
            linear_attention("attention", tokens, self.dim, bits),
            elementwise("constant and normaliser", tokens * self.dim, 3, 3),
            projection("output", tokens, self.dim, self.dim),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Released state, without a matrix of random projections that its code does not use."""
        return {
            key.replace("fast_attention.ksh.", "hash."): value
            for key, value in state.items()
            if key != "fast_attention.projection_matrix"
        }


class KernelHash(nn.Module):
    """Codes of plus and minus ones from a token's similarities to anchors, by functions of each head.

    With u the normalised token, ``code = sign(A f)`` for ``f_m = exp(-|u - anchor_m|^2 / (2 sigma)) - mvec_m`` and
    sigma the mean squared distance of the item's tokens to the anchors.
    """

    A: Tensor  # (heads, bits, anchors)
    mvec: Tensor  # (1, heads, 1, anchors)
    anchor: Tensor  # (1, heads, anchors, D)

    def __init__(self, num_heads: int, head_dim: int, bits: int, anchors: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(1, num_heads, anchors, head_dim, generator=generator)
        self.register_buffer("anchor", F.normalize(directions, dim=-1))
        self.register_buffer("A", torch.randn(num_heads, bits, anchors, generator=generator))
        # The feature of a token at the mean distance.
        self.register_buffer("mvec", torch.full((1, num_heads, 1, anchors), math.exp(-0.5)))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes (B, N, heads, bits) of tokens (B, N, heads, D), at least in float32; ``mask`` (B, N) is as ever."""
        precise = torch.promote_types(x.dtype, torch.float32)
        with precisely(x):
            features = _kernel(_unit(x).transpose(1, 2), self.anchor.to(precise), mask) - self.mvec.to(precise)
            projected = features @ self.A.to(precise).transpose(-2, -1)
        return _Sign.apply(projected).transpose(1, 2)

    def learn(self, x: Tensor, seed: int = 0) -> None:
        """Replace anchors and functions by some that are learned from tokens (N, heads, D).

        Random tokens become anchors. The targets of codes' products are 1 for each token's 10 most similar others and
        -1 for its 10 least similar ones. Bit after bit, the function starts from the leading direction of what the bits
        before have left of the targets, and takes 100 steps of gradient descent, with tanh in place of the sign.
        """
        with precisely(x):
            unit = _unit(x).transpose(0, 1)  # (heads, N, D)
            generator = torch.Generator().manual_seed(seed)
            heads, bits, anchors = self.A.shape
            order = torch.randperm(unit.shape[1], generator=generator)
            chosen = order.repeat(-(-anchors // len(order)))[:anchors].to(x.device)  # repeated where there are few
            points = unit[:, chosen]
            features = _kernel(unit[None], points[None], None)[0]
            centre = features.mean(1, keepdim=True)
            features = features - centre
            left = bits * _targets(unit)
            functions = []
            for _ in range(bits):
                function = _fit(features, left)
                code = _sign(features @ function[..., None])
                left = left - code @ code.transpose(-2, -1)
                functions.append(function)
            self.anchor.copy_(points[None])
            self.mvec.copy_(centre[None])
            self.A.copy_(torch.stack(functions, 1).view(heads, bits, anchors))


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def _kernel(unit: Tensor, anchor: Tensor, mask: Tensor | None) -> Tensor:
    """Similarities (B, heads, N, anchors) of tokens (B, heads, N, D) to anchors (B or 1, heads, anchors, D)."""
    products = unit @ anchor.transpose(-2, -1)
    distance = unit.square().sum(-1, keepdim=True) + anchor.square().sum(-1)[..., None, :] - 2 * products
    distance = distance.clamp_min(0)
    if mask is None:
        sigma = distance.mean((-2, -1), keepdim=True)
    else:
        total = distance.masked_fill(~mask[:, None, :, None], 0).sum((-2, -1), keepdim=True)
        sigma = total / (mask.sum(1).clamp_min(1)[:, None, None, None] * anchor.shape[-2])
    return (-distance / (2 * sigma).clamp_min(1e-6)).exp()


def _targets(unit: Tensor) -> Tensor:
    """(heads, N, N): 1 for similar tokens, -1 for dissimilar ones, 0 for others, averaged over both directions."""
    similarity = unit @ unit.transpose(-2, -1)
    count = min(NEIGHBOURS, unit.shape[1] // 2)
    targets = torch.zeros_like(similarity)
    targets.scatter_(-1, similarity.topk(count).indices, 1.0)
    targets.scatter_(-1, similarity.topk(count, largest=False).indices, -1.0)
    return (targets + targets.transpose(-2, -1)) / 2


def _fit(features: Tensor, left: Tensor) -> Tensor:
    """The function (heads, anchors) whose bits' products come nearest to ``left`` (heads, N, N)."""
    tokens = features.shape[1]
    gram = features.transpose(-2, -1) @ features
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-8
    root = torch.linalg.cholesky(gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    pulled = features.transpose(-2, -1) @ left @ features
    half = torch.linalg.solve_triangular(root, pulled, upper=False)
    whitened = torch.linalg.solve_triangular(root, half.transpose(-2, -1), upper=False)
    leading = torch.linalg.eigh((whitened + whitened.transpose(-2, -1)) / 2).eigenvectors[..., -1:]
    start = torch.linalg.solve_triangular(root.transpose(-2, -1), leading, upper=True)
    start = start * math.sqrt(tokens) / (features @ start).norm(dim=-2, keepdim=True).clamp_min(1e-6)
    function = start
    for _ in range(STEPS):
        soft = (features @ function / 2).tanh()
        slope = -4 * (left @ soft - soft * soft.square().sum(-2, keepdim=True)) / tokens
        function = function - RATE * features.transpose(-2, -1) @ (slope * (1 - soft.square()) / 2)

    def agreement(candidate: Tensor) -> Tensor:
        code = _sign(features @ candidate)
        return code.transpose(-2, -1) @ left @ code

    return torch.where(agreement(function) >= agreement(start), function, start)[..., 0]


def _sign(x: Tensor) -> Tensor:
    """1 or -1, never 0."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


class _Sign(torch.autograd.Function):
    """The sign, whose gradient is passed through where its argument is between -1 and 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1)

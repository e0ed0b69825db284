"""TransMIL: a small transformer over all instances of the bag, with Nystrom attention and a convolution for position.

Source: Shao, Bian, Chen, Wang, Zhang, Ji and Zhang, TransMIL: Transformer based Correlated Multiple Instance Learning
for Whole Slide Image Classification, NeurIPS 2021, arXiv 2106.00908. Attention: Xiong et al., Nystromformer, AAAI 2021,
arXiv 2102.03902.

The bag is laid out as a square by repeating its first instances. Landmarks and the scale of the pseudo-inverse depend
on all tokens of a bag, so bags are handled one by one. Two savings that change no number: the second layer is computed
for the class token alone, which is all that is read, and the three depthwise convolutions are one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, attend, depthwise, elementwise, projection
from attention.parameters import Positive, Probability
from attention.pooling import PooledBags, Pooler, check_features, rename, strip_wrappers
from attention.registry import register
from kernels.dense import linear
from kernels.errors import InputError
from kernels.segment import segment_lengths

_INVERSE_STEPS = 6
_REACH = 16  # of the residual convolution, to either side


@register("transmil", kind="pooling")
class TransMIL(Pooler):
    """TransMIL: two Nystrom attention layers around a positional convolution (Shao et al. 2021).

    ``attention`` is the logarithm of the class token's attention in the last layer, averaged over heads and brought
    back from the square to the instances; Nystrom's approximation can be slightly negative there and is clamped. While
    training it is not computed and left at zero. The order of the instances matters to the result.

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        hidden_dim: size H of the tokens.
        num_heads: attention heads.
        num_landmarks: landmarks of the Nystrom attention; None for H / 2.
        dropout: probability after each attention layer while training.
    """

    about = About("Shao et al., NeurIPS 2021, 2106.00908", "O(N)", "varlen_attention", "GPL-3.0")

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive = 512,
        num_heads: Positive = 8,
        num_landmarks: Positive | None = None,
        dropout: Probability = 0.1,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise InputError(f"attention.hidden_dim={hidden_dim} must be a multiple of num_heads={num_heads}.")
        num_landmarks = num_landmarks or hidden_dim // 2
        self.dim = dim
        self.embed = nn.Linear(dim, hidden_dim)
        self.class_token = nn.Parameter(torch.randn(hidden_dim))
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.attention1 = NystromAttention(hidden_dim, num_heads, num_landmarks, dropout)
        self.position = PositionalConvolution(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.attention2 = NystromAttention(hidden_dim, num_heads, num_landmarks, dropout)
        self.norm = nn.LayerNorm(hidden_dim)
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        check_features(features, self.dim, self.name)
        tokens = linear(features, self.embed.weight, self.embed.bias, "relu")
        sizes = segment_lengths(cu_seqlens).tolist()
        outcomes = [self._pool(bag) for bag in (tokens.split(sizes) if len(sizes) > 1 else [tokens])]
        embeddings = self.norm(torch.stack([token for token, _ in outcomes]))
        attention = torch.cat([scores for _, scores in outcomes])[None]
        return PooledBags(self.classifier(embeddings), embeddings, attention)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """As if all bags were of one size."""
        bags, instances = shape
        count = math.ceil(instances / max(bags, 1))
        side = math.isqrt(max(count - 1, 0)) + 1 if count else 0
        hidden = self.embed.out_features
        return [
            projection("embedding", instances, self.dim, hidden),
            *self.attention1.cost(bags, side * side + 1, side * side + 1),
            depthwise("positional convolution", bags * side * side, hidden, 49),
            *self.attention2.cost(bags, side * side + 1, 1),
            projection("classifier", bags, hidden, self.classifier.out_features),
        ]

    def _pool(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """Class token (H,) and attention scores (N,) of one bag of tokens ``(N, H)``."""
        count = len(bag)
        side = math.isqrt(max(count - 1, 0)) + 1 if count else 0
        tokens = torch.cat([self.class_token[None].to(bag.dtype), bag, bag[: side * side - count]])
        tokens = tokens + self.attention1(self.norm1(tokens))
        if count:
            tokens = torch.cat([tokens[:1], self.position(tokens[1:], side)])
        update, row = self.attention2.first(self.norm2(tokens), with_row=not self.training)
        token = tokens[0] + update
        if row is None:
            return token, token.new_zeros(count, dtype=torch.float32)
        scores = row[1 : count + 1].clone()
        scores[: side * side - count] += row[count + 1 :]
        return token, scores.clamp_min(torch.finfo(torch.float32).tiny).log()

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the paper's released ``TransMIL`` to ours."""
        state = strip_wrappers(state)
        if "cls_token" in state:
            state["class_token"] = state.pop("cls_token").flatten()
        names: dict[str, str] = {}
        for kind in ("weight", "bias"):
            names |= {f"_fc1.0.{kind}": f"embed.{kind}", f"_fc2.{kind}": f"classifier.{kind}"}
            for size, theirs in ((7, "proj"), (5, "proj1"), (3, "proj2")):
                names[f"pos_layer.{theirs}.{kind}"] = f"position.conv{size}.{kind}"
            for layer in (1, 2):
                names[f"layer{layer}.norm.{kind}"] = f"norm{layer}.{kind}"
                names[f"layer{layer}.attn.to_qkv.{kind}"] = f"attention{layer}.qkv.{kind}"
                names[f"layer{layer}.attn.to_out.0.{kind}"] = f"attention{layer}.out.{kind}"
                names[f"layer{layer}.attn.res_conv.{kind}"] = f"attention{layer}.residual.{kind}"
        return rename(state, names)


class NystromAttention(nn.Module):
    """Softmax attention through landmarks, the means of runs of consecutive tokens, over one sequence.

    With queries q, keys k, and their landmarks q', k': softmax(q k'^T) pinv(softmax(q' k'^T)) softmax(q' k^T) v, plus a
    convolution of v along the sequence.
    """

    def __init__(self, dim: int, num_heads: int, num_landmarks: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_landmarks = num_landmarks
        self.dropout = dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.residual = nn.Conv2d(
            num_heads, num_heads, (2 * _REACH + 1, 1), padding=(_REACH, 0), groups=num_heads, bias=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Attend within ``tokens (n, H)``."""
        q, k, v, front = self._project(tokens)
        q_marks, k_marks = self._landmarks(q, len(tokens)), self._landmarks(k, len(tokens))
        inverse = pseudo_inverse((q_marks @ k_marks.transpose(1, 2)).softmax(-1))
        # From the right, each product is an attention: the fused operator builds neither n x landmarks matrix.
        gathered = inverse @ _attend(q_marks, k, v)
        attended = _attend(q[:, front:], k_marks, gathered)
        return self._merge(attended + self.residual(v[None])[0][:, front:])

    def first(self, tokens: Tensor, with_row: bool) -> tuple[Tensor, Tensor | None]:
        """The first token's result (H,) alone and, ``with_row``, its attention to each token, mean over heads, (n,).

        The row is float32 and carries no gradient.
        """
        q, k, v, front = self._project(tokens)
        q_marks, k_marks = self._landmarks(q, len(tokens)), self._landmarks(k, len(tokens))
        inverse = pseudo_inverse((q_marks @ k_marks.transpose(1, 2)).softmax(-1))
        to_marks = (q[:, front : front + 1] @ k_marks.transpose(1, 2)).softmax(-1) @ inverse  # (heads, 1, landmarks)
        gathered = _attend(q_marks, k, v)
        # What the convolution sees around the first token, zeros beyond both ends.
        start, end = front - _REACH, front + _REACH + 1
        window = F.pad(v[:, max(start, 0) : end], (0, 0, max(-start, 0), max(end - v.shape[1], 0)))
        local = (window * self.residual.weight[:, 0]).sum(1, keepdim=True)
        out = self._merge(to_marks @ gathered + local)[0]
        if not with_row:
            return out, None
        with torch.no_grad():
            row = torch.zeros(k.shape[1], device=k.device)
            for head in range(self.num_heads):  # one head at a time: landmarks x tokens is the largest array here
                row += (to_marks[head] @ (q_marks[head] @ k[head].t()).softmax(-1))[0]
            return out, row[front:] / self.num_heads

    def cost(self, bags: int, tokens: int, read: int) -> list[Part]:
        """What the norm before it and attention cost on sequences of ``tokens`` of which ``read`` outputs are wanted.

        For a single one, the weights of that token on all others are in it.
        """
        dim, marks = self.out.in_features, self.num_landmarks
        total = bags * math.ceil(tokens / marks) * marks
        square = bags * self.num_heads * marks**2
        parts = [
            elementwise("normalisation", bags * tokens * dim, flops=8),
            projection("q, k, v", total, dim, 3 * dim),
            elementwise("landmarks", 2 * total * dim, tensors=1),
            Part("landmark scores", 2 * bags * marks**2 * dim, 2 * bags * marks * dim + square),
            Part("pseudo-inverse", _INVERSE_STEPS * 8 * square * marks, 2 * square),
            attend("landmarks' attention", bags * marks, total / max(bags, 1), dim, total),
        ]
        if read == 1:
            parts.append(Part("weights of the token", 2 * total * marks * dim, total * (dim + 1)))
        else:
            parts += [
                Part("landmarks' values", 2 * bags * marks**2 * dim, square + 2 * bags * marks * dim),
                attend("attention to landmarks", bags * read, marks, dim, bags * marks),
                depthwise("residual convolution", total, dim, 2 * _REACH + 1),
            ]
        return [*parts, projection("output", bags * read, dim, dim)]

    def _merge(self, attended: Tensor) -> Tensor:
        """Heads (heads, n, d) side by side through the last layer, (n, H)."""
        out = linear(attended.transpose(0, 1).flatten(1), self.out.weight, self.out.bias)
        return F.dropout(out, self.dropout, self.training)

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """q (scaled), k and v, each (heads, n + front, H / heads), with ``front`` zero tokens before the first, so that
        the landmarks divide the sequence."""
        front = -len(tokens) % self.num_landmarks
        qkv = F.pad(linear(tokens, self.qkv.weight), (0, 0, front, 0))
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).permute(1, 2, 0, 3)
        return q * q.shape[-1] ** -0.5, k, v, front

    def _landmarks(self, x: Tensor, count: int) -> Tensor:
        """Mean of each of the ``num_landmarks`` runs of ``x (heads, n, d)``, (heads, landmarks, d)."""
        return x.unflatten(1, (self.num_landmarks, -1)).sum(2) / math.ceil(count / self.num_landmarks)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v of each head, (heads, n, d); ``q`` is scaled already."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None], scale=1.0)[0]


class PositionalConvolution(nn.Module):
    """x + 7x7, 5x5 and 3x3 depthwise convolutions of the tokens laid out as a square (the paper's PPEG)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv7 = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.conv5 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv3 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, side: int) -> Tensor:
        """``tokens (side * side, H)``, row by row, to the same."""
        # The sum of convolutions is the convolution with the sum of the kernels, centred.
        kernel = self.conv7.weight + F.pad(self.conv5.weight, (1, 1, 1, 1)) + F.pad(self.conv3.weight, (2, 2, 2, 2))
        bias = self.conv7.bias + self.conv5.bias + self.conv3.bias  # type: ignore[operator]
        grid = tokens.view(1, side, side, -1).permute(0, 3, 1, 2)
        return tokens + F.conv2d(grid, kernel, bias, padding=3, groups=len(kernel)).flatten(2)[0].t()


def pseudo_inverse(x: Tensor) -> Tensor:
    """Approximate Moore-Penrose inverse of ``x (heads, m, m)`` by six steps of the third-order iteration.

    The start is scaled by maxima over all heads, as in the released code.
    """
    absolute = x.abs()
    inverse = x.transpose(1, 2) / (absolute.sum(1).max() * absolute.sum(2).max())
    identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    for _ in range(_INVERSE_STEPS):
        product = x @ inverse
        inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
    return inverse

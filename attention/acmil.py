"""ACMIL: several attention branches kept different from each other, and top instances hidden at random.

Source: Zhang, Li, Sun, Zheng, Zhu, Zhang and Yang, Attention-Challenging Multiple Instance Learning for Whole Slide
Image Classification, ECCV 2024, arXiv 2311.07125. The entropy term is AEM: Zhang et al., Attention Entropy
Maximization, MICCAI 2025, arXiv 2406.15303.

Knowing deviations from the paper, both those of its code: a fixed count of the top instances is hidden, not each with
probability p; and all three losses have weight 1. The bag feature is computed as the mean of the branch features, which
equals pooling with the mean attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from attention.abmil import attention_cost, attention_weights
from attention.about import About
from attention.cost import Part, projection
from attention.parameters import Count, NotNegative, Positive, Probability
from attention.pooling import (
    Objective,
    PooledBags,
    Pooler,
    check_features,
    default_hidden_dim,
    join,
    numbered,
    rename,
    strip_wrappers,
)
from attention.registry import register
from kernels.errors import InputError
from kernels.gated_attention_pool.embedded import embedded_attention_pool
from kernels.segment import segment_ids, segment_lengths, segment_top_k, segment_weighted_sum


class ChallengedPooler(Pooler):
    """What both forms of ACMIL share: the hiding of top instances, branch classifiers and the losses.

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        hidden_dim: size H of the embedding; None for :func:`attention.pooling.default_hidden_dim`.
        num_branches: attention branches K.
        num_masked: the hidden instances are drawn from this many of highest score, per branch and bag; 0: never hide.
        mask_drop: share of them that is hidden while training, in [0, 1].
        semantic_weight: weight of the branch classifiers' loss; a weight of 0 switches a loss off.
        diversity_weight: weight of the cosine similarity between the branches' attention.
        bag_weight: weight of the bag classifier's loss.
        entropy_weight: weight of the attention's negative entropy (AEM; 0.1 on the top 100 is its authors' advice).
        entropy_top_k: instances of highest attention the entropy is taken over; None for all.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        hidden_dim: int | None,
        num_branches: int,
        num_masked: int,
        mask_drop: float,
        semantic_weight: float,
        diversity_weight: float,
        bag_weight: float,
        entropy_weight: float,
        entropy_top_k: int | None,
    ) -> None:
        super().__init__()
        if num_branches < 1:
            raise InputError(f"attention.num_branches={num_branches} must be 1 or more.")
        if num_masked < 0 or not 0 <= mask_drop <= 1:
            raise InputError(
                f"attention.num_masked={num_masked} must not be negative and attention.mask_drop={mask_drop} must lie "
                "between 0 and 1; mask_drop=0 never hides an instance."
            )
        self.dim = dim
        self.hidden_dim = hidden_dim or default_hidden_dim(dim)
        self.num_branches = num_branches
        self.num_masked = num_masked
        self.mask_drop = mask_drop
        self.semantic_weight = semantic_weight
        self.diversity_weight = diversity_weight
        self.bag_weight = bag_weight
        self.entropy_weight = entropy_weight
        self.entropy_top_k = entropy_top_k
        self.branch_weight = nn.Parameter(torch.empty(num_branches, num_classes, self.hidden_dim))
        self.branch_bias = nn.Parameter(torch.empty(num_branches, num_classes))
        self.classifier = nn.Linear(self.hidden_dim, num_classes)
        bound = 1 / math.sqrt(self.hidden_dim)  # as nn.Linear draws them
        nn.init.uniform_(self.branch_weight, -bound, bound)
        nn.init.uniform_(self.branch_bias, -bound, bound)

    def classify_branches(self, branches: Tensor) -> Tensor:
        """Each branch's own logits (B, K, C) of its bag features ``(B, K, H)``."""
        return torch.einsum("bkh,kch->bkc", branches, self.branch_weight) + self.branch_bias

    def classifier_cost(self, bags: int) -> list[Part]:
        """What the branches' classifiers and that of the bag cost."""
        hidden, classes = self.hidden_dim, self.classifier.out_features
        return [
            projection("branch classifiers", bags, self.num_branches * hidden, classes),
            projection("classifier", bags, hidden, classes),
        ]

    def hide_top(self, scores: Tensor, cu_seqlens: Tensor, noise: Tensor | None) -> Tensor:
        """Which of the top instances each row must not see this time (STKIM), (R, T) bool.

        Of the k = min(num_masked, N) highest scores of a bag, int(k * mask_drop) are chosen by the order of ``noise
        (R, B, num_masked)``, uniform and drawn here when None.
        """
        indices, valid = segment_top_k(scores, cu_seqlens, self.num_masked)
        if noise is None:
            noise = torch.rand(indices.shape, device=scores.device)
        chosen = noise.masked_fill(~valid, torch.inf).argsort(dim=-1)  # places in the list, in random order
        counts = torch.tensor([int(k * self.mask_drop) for k in range(self.num_masked + 1)], device=scores.device)
        taken = torch.arange(self.num_masked, device=scores.device) < counts[valid.sum(1)][:, None]
        total = scores.shape[1]
        hidden = torch.zeros(len(scores), total + 1, dtype=torch.bool, device=scores.device)
        hidden.scatter_(1, indices.gather(-1, chosen).where(taken, total).flatten(1), True)
        return hidden[:, :total]

    @property
    def hides(self) -> bool:
        """Whether instances are hidden now."""
        return self.training and self.num_masked > 0 and self.mask_drop > 0

    def loss(self, bags: PooledBags, target: Tensor, cu_seqlens: Tensor, objective: Objective) -> dict[str, Tensor]:
        """Semantic + bag + diversity (+ entropy), each mean over the bags; terms of weight 0 are left out."""
        branch_logits, weights = bags.extras["branch_logits"], bags.extras["weights"]
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.bag_weight:
            terms["bag"] = (self.bag_weight, objective.loss(bags.logits, target).mean())
        if self.semantic_weight and self.num_branches > 1:
            repeated = target.repeat_interleave(self.num_branches, 0)
            terms["semantic"] = (self.semantic_weight, objective.loss(branch_logits.flatten(0, 1), repeated).mean())
        if self.diversity_weight and self.num_branches > 1:
            terms["diversity"] = (
                self.diversity_weight,
                branch_similarity(weights, cu_seqlens, self.num_branches).mean(),
            )
        if self.entropy_weight:
            terms["entropy"] = (
                self.entropy_weight,
                negative_entropy(weights, cu_seqlens, self.entropy_top_k).mean(),
            )
        total = (
            torch.stack([weight * term for weight, term in terms.values()]).sum() if terms else bags.logits.sum() * 0
        )
        return {**{name: term for name, (_, term) in terms.items()}, "total": total}


@register("acmil", kind="pooling")
class ACMIL(ChallengedPooler):
    """ACMIL: gated attention with diverse branches and hidden top instances (Zhang et al. 2024).

    ``attention_dim`` is the inner size of the gated score; the other arguments are those of :class:`ChallengedPooler`.
    """

    about = About("Zhang et al., ECCV 2024, 2311.07125", "O(N)", "gated_attention_pool", "MIT")

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        attention_dim: Positive = 128,
        num_branches: Positive = 5,
        num_masked: Count = 10,
        mask_drop: Probability = 0.6,
        semantic_weight: NotNegative = 1.0,
        diversity_weight: NotNegative = 1.0,
        bag_weight: NotNegative = 1.0,
        entropy_weight: NotNegative = 0.0,
        entropy_top_k: Positive | None = None,
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_classes,
            hidden_dim,
            num_branches,
            num_masked,
            mask_drop,
            semantic_weight,
            diversity_weight,
            bag_weight,
            entropy_weight,
            entropy_top_k,
        )
        self.dropout = dropout
        self.embed = nn.Linear(dim, self.hidden_dim, bias=False)
        self.gate = nn.Linear(self.hidden_dim, 2 * attention_dim)
        self.score = nn.Linear(attention_dim, num_branches)

    def forward(self, features: Tensor, cu_seqlens: Tensor, mask_noise: Tensor | None = None) -> PooledBags:
        """As :class:`Pooler`; ``mask_noise (K, B, num_masked)`` replaces the random draw of the hidden instances."""
        check_features(features, self.dim, self.name)
        branches, weights, scores = embedded_attention_pool(
            features,
            attention_weights(self.embed, self.gate, self.score),
            cu_seqlens,
            hide=(lambda scores: self.hide_top(scores, cu_seqlens, mask_noise)) if self.hides else None,
            dropout=self.dropout if self.training else 0.0,
        )
        embeddings = branches.mean(1)
        extras = {"branch_logits": self.classify_branches(branches), "weights": weights}
        return PooledBags(self.classifier(embeddings), embeddings, scores, extras)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        return [*attention_cost(self.embed, self.gate, self.score, bags, instances), *self.classifier_cost(bags)]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the paper's released ``ACMIL_GA`` to ours."""
        state = strip_wrappers(state)
        for kind in ("weight", "bias"):
            join(state, f"gate.{kind}", [f"attention.attention_{gate}.0.{kind}" for gate in "VU"])
            join(state, f"branch_{kind}", numbered(state, f"classifier.{{}}.fc.{kind}"), stack=True)
            state = rename(
                state,
                {
                    f"dimreduction.fc1.{kind}": f"embed.{kind}",
                    f"attention.attention_weights.{kind}": f"score.{kind}",
                    f"Slide_classifier.fc.{kind}": f"classifier.{kind}",
                },
            )
        return state


def branch_similarity(weights: Tensor, cu_seqlens: Tensor, num_branches: int) -> Tensor:
    """Mean cosine between the attention of every two branches, (B,); 0 for an empty bag.

    ``weights (K * heads, T)`` are per-bag softmaxes, branch by branch; the cosine is averaged over heads.
    """
    heads = len(weights) // num_branches
    products = segment_weighted_sum(weights, weights.t(), cu_seqlens)  # (B, K * heads, K * heads)
    products = products.unflatten(1, (num_branches, heads)).unflatten(3, (num_branches, heads))
    products = products.diagonal(dim1=2, dim2=4)  # (B, K, K, heads)
    # Branches of one bag never have zero attention, except where the bag is empty.
    squares = products.diagonal(dim1=1, dim2=2).clamp_min(1e-16)  # (B, heads, K)
    norms = squares.sqrt().transpose(1, 2)
    cosines = products / (norms[:, :, None] * norms[:, None])
    first, second = torch.triu_indices(num_branches, num_branches, 1, device=weights.device)
    return cosines[:, first, second].flatten(1).mean(1)


def negative_entropy(weights: Tensor, cu_seqlens: Tensor, top_k: int | None = None) -> Tensor:
    """Sum of p log p of each bag's attention ``weights (R, T)``, mean over rows, (B,).

    With ``top_k`` it is that of each row's largest weights, scaled to sum to one.
    """
    if top_k is None:
        ids = segment_ids(cu_seqlens, weights.shape[1])
        terms = _p_log_p(weights)
        return terms.new_zeros(cu_seqlens.numel() - 1).index_add(0, ids, terms.mean(0))
    longest = int(segment_lengths(cu_seqlens).max()) if cu_seqlens.numel() > 1 else 0
    if not longest:
        return weights.new_zeros(cu_seqlens.numel() - 1)
    indices, valid = segment_top_k(weights, cu_seqlens, min(top_k, longest))
    rows = torch.arange(len(weights), device=weights.device)[:, None, None]
    largest = weights[rows, indices.clamp_max(weights.shape[1] - 1)] * valid  # (R, B, k)
    share = largest / largest.sum(-1, keepdim=True).clamp_min(torch.finfo(largest.dtype).tiny)
    return _p_log_p(share).sum(-1).mean(0)


def _p_log_p(p: Tensor) -> Tensor:
    """p log p, with a finite gradient where p is 0 (hidden instances)."""
    return p * p.clamp_min(torch.finfo(p.dtype).tiny).log()

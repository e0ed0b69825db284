"""Attention-based MIL pooling: a weighted mean of the instances, the weights from a small network.

Source: Ilse, Tomczak and Welling, Attention-based Deep Multiple Instance Learning, ICML 2018, arXiv 1802.04712, eq. 7
and 8. The options cover the forms in common use: ReLU or GELU embedding, with or without bias, batch normalisation of
the inputs and of the bag feature (PackMIL's form for grading).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, elementwise, projection
from attention.parameters import Positive, Probability
from attention.pooling import (
    PooledBags,
    Pooler,
    check_features,
    default_hidden_dim,
    join,
    rename,
    strip_wrappers,
    weighted_sums,
)
from attention.registry import register
from kernels.errors import unknown_name
from kernels.gated_attention_pool.embedded import AttentionWeights, embedded_attention_pool


@register("abmil", kind="pooling")
class ABMIL(Pooler):
    """ABMIL: attention pooling with a tanh score (Ilse et al. 2018).

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        hidden_dim: size H of the embedding; None for :func:`attention.pooling.default_hidden_dim`.
        attention_dim: inner size of the score.
        dropout: probability on the embedding while training.
        act: ``"relu"`` or ``"gelu"`` after the embedding.
        input_bias: whether the embedding has a bias.
        norm: ``"batch"`` normalises the inputs over all instances and the bag features over the bags of a batch; a
            bag's result then depends on its batch while training.
    """

    about = About("Ilse et al., ICML 2018, 1802.04712", "O(N)", "gated_attention_pool", "MIT")

    gated: ClassVar[bool] = False

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        attention_dim: Positive = 128,
        dropout: Probability = 0.0,
        act: Literal["relu", "gelu"] = "relu",
        input_bias: bool = True,
        norm: Literal["batch"] | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = hidden_dim or default_hidden_dim(dim)
        if act not in ("relu", "gelu"):
            raise unknown_name("attention.act", act, ("relu", "gelu"))
        if norm not in ("batch", None):
            raise unknown_name("attention.norm", norm, ("batch", "null"))
        self.dim = dim
        self.act = act
        self.dropout = dropout
        self.input_norm = BagNorm(dim) if norm else None
        self.embed = nn.Linear(dim, hidden_dim, bias=input_bias)
        self.gate = nn.Linear(hidden_dim, (2 if self.gated else 1) * attention_dim)
        self.score = nn.Linear(attention_dim, 1)
        self.bag_norm = BagNorm(hidden_dim) if norm else None
        self.classifier = nn.Linear(hidden_dim, num_classes)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        check_features(features, self.dim, self.name)
        if self.input_norm is not None:
            features = self.input_norm(features)
        pooled, weights, scores = embedded_attention_pool(
            features,
            attention_weights(self.embed, self.gate, self.score),
            cu_seqlens,
            activation=self.act,
            dropout=self.dropout if self.training else 0.0,
        )
        embeddings = pooled[:, 0]
        if self.bag_norm is not None:
            embeddings = self.bag_norm(embeddings)
        return PooledBags(self.classifier(embeddings), embeddings, scores, {"weights": weights})

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        parts = attention_cost(self.embed, self.gate, self.score, bags, instances)
        if self.input_norm is not None:
            parts.insert(0, elementwise("normalisation", instances * self.dim, flops=2))
        return [*parts, projection("classifier", bags, self.classifier.in_features, self.classifier.out_features)]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the ACMIL repository (gated) and of the PackMIL repository (tanh) to ours."""
        state = strip_wrappers(state)
        for kind in ("weight", "bias"):
            join(state, f"gate.{kind}", [f"attention.attention_{gate}.0.{kind}" for gate in "VU"])
            state = rename(
                state,
                {
                    f"dimreduction.fc1.{kind}": f"embed.{kind}",
                    f"attention.attention_weights.{kind}": f"score.{kind}",
                    f"classifier.fc.{kind}": f"classifier.{kind}",
                    f"feature.0.{kind}": f"embed.{kind}",
                    f"attention.0.{kind}": f"gate.{kind}",
                    f"attention.2.{kind}": f"score.{kind}",
                },
            )
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            state = rename(state, {f"norm.{part}": f"input_norm.{part}", f"norm1.{part}": f"bag_norm.{part}"})
        return state


class BagNorm(nn.BatchNorm1d):
    """Batch normalisation that falls back on its running statistics where a batch of one row has no spread."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(x)


def attention_weights(embed: nn.Linear, gate: nn.Linear, score: nn.Linear) -> AttentionWeights:
    """The parameters of three layers in the form the kernel takes."""
    return AttentionWeights(embed.weight, embed.bias, gate.weight, gate.bias, score.weight, score.bias)


def attention_cost(embed: nn.Linear, gate: nn.Linear, score: nn.Linear, bags: int, instances: int) -> list[Part]:
    """What embedding, score and weighted sums cost, for as many branches as there are scores."""
    hidden, inner, branches = embed.out_features, score.in_features, score.out_features
    return [
        projection("embedding", instances, embed.in_features, hidden),
        projection("gate", instances, hidden, gate.out_features),
        projection("scores", instances, inner, branches),
        weighted_sums("bag features", bags, instances, branches, hidden),
    ]

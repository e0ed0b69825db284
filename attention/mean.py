"""Mean pooling: the mean over the bag of the logits of its instances.

The baseline of the ACMIL and PackMIL repositories: Linear, ReLU or GELU, dropout, Linear per instance. The last layer
being linear, the logits of the mean embedding are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, projection
from attention.parameters import Positive, Probability
from attention.pooling import (
    PooledBags,
    Pooler,
    check_features,
    default_hidden_dim,
    rename,
    strip_wrappers,
    weighted_sums,
)
from attention.registry import register
from kernels.dense import linear
from kernels.errors import unknown_name
from kernels.segment import segment_lengths, segment_weighted_sum


class InstanceClassifier(Pooler):
    """What mean and max pooling share: an embedding and a classifier of instances, Xavier weights and zero biases.

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        hidden_dim: size H of the embedding; None for :func:`attention.pooling.default_hidden_dim`.
        dropout: probability on the embedding while training.
        act: ``"relu"`` or ``"gelu"``.
    """

    attention_rows = "class"

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        dropout: Probability = 0.25,
        act: Literal["relu", "gelu"] = "relu",
    ) -> None:
        super().__init__()
        if act not in ("relu", "gelu"):
            raise unknown_name("attention.act", act, ("relu", "gelu"))
        self.dim = dim
        self.act = act
        self.dropout = dropout
        self.embed = nn.Linear(dim, hidden_dim or default_hidden_dim(dim))
        self.classifier = nn.Linear(self.embed.out_features, num_classes)
        for layer in (self.embed, self.classifier):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def hidden(self, features: Tensor) -> Tensor:
        """Embedding (T, H) of ``features (T, D)``."""
        check_features(features, self.dim, self.name)
        hidden = linear(features, self.embed.weight, self.embed.bias, self.act)
        return F.dropout(hidden, self.dropout, self.training)

    def cost(self, shape: Sequence[int]) -> list[Part]:
        """Embedding and classification of every instance."""
        _, instances = shape
        hidden = self.embed.out_features
        return [
            projection("embedding", instances, self.dim, hidden),
            projection("instance logits", instances, hidden, self.classifier.out_features),
        ]

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the ACMIL repository (``head``) and of CLAM's ``MIL_fc`` and ``MIL_fc_mc`` to ours."""
        state = strip_wrappers(state)
        for kind in ("weight", "bias"):
            state = rename(
                state,
                {
                    f"head.0.{kind}": f"embed.{kind}",
                    f"head.3.{kind}": f"classifier.{kind}",
                    f"fc.0.{kind}": f"embed.{kind}",
                    f"classifiers.{kind}": f"classifier.{kind}",
                },
            )
        return state


@register("mean", kind="pooling")
class MeanPooling(InstanceClassifier):
    """Mean pooling: the average of the instance logits.

    Arguments as :class:`InstanceClassifier`.
    """

    about = About("baseline of Ilse et al., ICML 2018, 1802.04712", "O(N)", "", "-")

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        hidden = self.hidden(features)
        lengths = segment_lengths(cu_seqlens)
        share = (1 / lengths.clamp_min(1).to(hidden.dtype)).repeat_interleave(lengths, output_size=len(hidden))
        embeddings = segment_weighted_sum(share[None], hidden, cu_seqlens)[:, 0]
        with torch.no_grad():
            instance_logits = self.classifier(hidden)
        return PooledBags(self.classifier(embeddings), embeddings, instance_logits.t())

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        hidden = self.embed.out_features
        return [
            *super().cost(shape),
            weighted_sums("bag features", bags, instances, 1, hidden),
            projection("classifier", bags, hidden, self.classifier.out_features),
        ]

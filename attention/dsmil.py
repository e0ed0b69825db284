"""DSMIL: the instance a classifier finds most critical is the query that attends to the rest of the bag.

Source: Li, Li and Eliceiri, Dual-stream Multiple Instance Learning Network for Whole Slide Image Classification with
Self-supervised Contrastive Learning, CVPR 2021, arXiv 2011.08939.

The loss uses the target's own objective on both streams: binary cross-entropy for multi-label targets, as in the paper,
cross-entropy for classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.about import About
from attention.cost import Part, projection
from attention.parameters import Positive, Probability
from attention.pooling import (
    Objective,
    PooledBags,
    Pooler,
    check_features,
    rename,
    strip_wrappers,
    weighted_sums,
)
from attention.registry import register
from kernels.dense import linear
from kernels.errors import unknown_name
from kernels.operators import autocasting
from kernels.segment import segment_dot, segment_softmax, segment_top_k, segment_weighted_sum


@register("dsmil", kind="pooling")
class DSMIL(Pooler):
    """DSMIL: a critical instance per class queries the bag (Li et al. 2021).

    Args:
        dim: feature size D.
        num_classes: number of logits C.
        query_dim: size of the queries.
        nonlinear: queries from two layers with ReLU and Tanh, or from one linear layer.
        passing_v: whether pooled features go through a layer of their own (D x D, with ReLU) first.
        dropout: probability in front of that layer while training.
        init: ``"default"`` is PyTorch's; ``"orthogonal"`` starts all layers orthogonal with zero biases, which the
            authors' code does for training.
    """

    about = About("Li et al., CVPR 2021, 2011.08939", "O(N)", "", "MIT")

    attention_rows = "class"

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        query_dim: Positive = 128,
        nonlinear: bool = True,
        passing_v: bool = False,
        dropout: Probability = 0.0,
        init: Literal["default", "orthogonal"] = "default",
    ) -> None:
        super().__init__()
        if init not in ("default", "orthogonal"):
            raise unknown_name("attention.init", init, ("default", "orthogonal"))
        self.dim = dim
        self.dropout = dropout
        self.instance_classifier = nn.Linear(dim, num_classes)
        self.query = nn.Linear(dim, query_dim)
        self.query_out = nn.Linear(query_dim, query_dim) if nonlinear else None
        self.value = nn.Linear(dim, dim) if passing_v else None
        self.classifier = nn.Linear(num_classes * dim, num_classes)
        if init == "orthogonal":
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        check_features(features, self.dim, self.name)
        if not autocasting(features):
            features = features.to(self.classifier.weight.dtype)
        instance_logits = linear(features, self.instance_classifier.weight, self.instance_classifier.bias)
        critical, valid = segment_top_k(instance_logits.detach().t().contiguous(), cu_seqlens, 1)
        critical = critical[:, :, 0].t()  # (B, C); one past the last instance where the bag is empty
        padded = torch.cat([instance_logits, self.instance_classifier.bias[None].to(instance_logits.dtype)])
        queries = self._queries(features)  # (T, Q)
        padded_queries = torch.cat([queries, queries.new_zeros(1, queries.shape[1])])
        scores = segment_dot(padded_queries[critical], queries, cu_seqlens) / math.sqrt(queries.shape[1])
        if scores.dtype in (torch.float16, torch.bfloat16):
            scores = scores.float()
        weights = segment_softmax(scores, cu_seqlens)
        embeddings = segment_weighted_sum(weights, self._values(features), cu_seqlens).flatten(1)
        extras = {
            "weights": weights,
            "max_logits": padded.gather(0, critical),
            "critical": critical.masked_fill(~valid, -1),
            "instance_logits": instance_logits,
        }
        return PooledBags(self.classifier(embeddings), embeddings, scores, extras)

    def loss(self, bags: PooledBags, target: Tensor, cu_seqlens: Tensor, objective: Objective) -> dict[str, Tensor]:
        """Half the bag loss and half the loss of the highest instance logits."""
        bag = objective.loss(bags.logits, target).mean()
        instance = objective.loss(bags.extras["max_logits"], target).mean()
        return {"bag": bag, "instance": instance, "total": 0.5 * bag + 0.5 * instance}

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        classes, width = self.instance_classifier.out_features, self.query.out_features
        parts = [
            projection("instance logits", instances, self.dim, classes),
            projection("queries", instances, self.dim, width),
        ]
        if self.query_out is not None:
            parts.append(projection("queries, second layer", instances, width, width))
        if self.value is not None:
            parts.append(projection("values", instances, self.dim, self.dim))
        return [
            *parts,
            Part("scores", 2 * instances * classes * width, instances * (width + classes) + bags * classes * width),
            weighted_sums("bag features", bags, instances, classes, self.dim),
            projection("classifier", bags, classes * self.dim, classes),
        ]

    def _queries(self, features: Tensor) -> Tensor:
        if self.query_out is None:
            return linear(features, self.query.weight, self.query.bias)
        inner = linear(features, self.query.weight, self.query.bias, "relu")
        return linear(inner, self.query_out.weight, self.query_out.bias).tanh()

    def _values(self, features: Tensor) -> Tensor:
        if self.value is None:
            return features
        return linear(F.dropout(features, self.dropout, self.training), self.value.weight, self.value.bias, "relu")

    @staticmethod
    def checkpoint_filter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the paper's released ``MILNet`` to ours."""
        state = strip_wrappers(state)
        for kind in ("weight", "bias"):
            state = rename(
                state,
                {
                    f"i_classifier.fc.0.{kind}": f"instance_classifier.{kind}",
                    f"i_classifier.fc.{kind}": f"instance_classifier.{kind}",
                    f"b_classifier.q.0.{kind}": f"query.{kind}",
                    f"b_classifier.q.{kind}": f"query.{kind}",
                    f"b_classifier.q.2.{kind}": f"query_out.{kind}",
                    f"b_classifier.v.1.{kind}": f"value.{kind}",
                    f"b_classifier.fcc.{kind}": f"classifier.{kind}",
                },
            )
        if state.get("classifier.weight", torch.empty(0)).ndim == 3:
            state["classifier.weight"] = state["classifier.weight"].flatten(1)
        return state

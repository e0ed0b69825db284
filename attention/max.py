"""Max pooling: the highest logit of any instance of the bag, class by class, or all logits of one instance.

``select="class"`` is the baseline of the ACMIL repository. ``select="instance"`` is that of CLAM (Lu et al., Nature
Biomedical Engineering 2021): of two classes, the instance with the highest probability of the second; of more, the one
that holds the highest probability of any class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from attention.about import About
from attention.cost import Part, elementwise
from attention.mean import InstanceClassifier
from attention.parameters import Positive, Probability
from attention.pooling import PooledBags
from attention.registry import register
from kernels.errors import unknown_name
from kernels.segment import segment_top_k


@register("max", kind="pooling")
class MaxPooling(InstanceClassifier):
    """Max pooling: the highest instance logits.

    ``select`` as in the module; the other arguments are those of :class:`attention.mean.InstanceClassifier`.

    The bag feature is the embedding of the selected instance (of the winning class with ``select="class"``).
    """

    about = About("instance baseline of Campanella et al., Nature Medicine 2019", "O(N)", "", "-")

    def __init__(
        self,
        dim: Positive,
        num_classes: Positive,
        hidden_dim: Positive | None = None,
        dropout: Probability = 0.25,
        act: Literal["relu", "gelu"] = "relu",
        select: Literal["class", "instance"] = "class",
    ) -> None:
        super().__init__(dim, num_classes, hidden_dim, dropout, act)
        if select not in ("class", "instance"):
            raise unknown_name("attention.select", select, ("class", "instance"))
        self.select = select

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        hidden = self.hidden(features)
        instance_logits = self.classifier(hidden)  # (T, C)
        rank = self._rank(instance_logits.detach())
        best, valid = segment_top_k(rank, cu_seqlens, 1)
        best = best[:, :, 0]  # (C or 1, B); one past the last instance where the bag is empty
        # An empty bag sees one instance of zeros: its logits are the biases, its feature is zero.
        padded = torch.cat([instance_logits, self.classifier.bias[None].to(instance_logits.dtype)])
        logits = padded[best[0]] if self.select == "instance" else padded.gather(0, best.t())
        winner = best[0] if len(best) == 1 else best.gather(0, logits.argmax(1)[None])[0]
        if len(hidden):
            embeddings = hidden[winner.clamp_max(len(hidden) - 1)] * valid
        else:
            embeddings = hidden.new_zeros(len(valid), hidden.shape[1])
        return PooledBags(logits, embeddings, instance_logits.detach().t())

    def cost(self, shape: Sequence[int]) -> list[Part]:
        bags, instances = shape
        return [
            *super().cost(shape),
            elementwise("largest logits", instances * self.classifier.out_features, tensors=1),
            elementwise("bag features", bags * self.embed.out_features, flops=0),
        ]

    def _rank(self, logits: Tensor) -> Tensor:
        """What instances are chosen by: a row per class, or one row, (C or 1, T)."""
        if self.select == "class":
            return logits.t().contiguous()
        probabilities = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
        return (probabilities[:, 1] if logits.shape[1] == 2 else probabilities.amax(1))[None]

"""What every pooler takes and returns: packed bags in, logits, embeddings and attention out.

A batch of bags is packed, never padded: ``features (T, D)`` holds all instances one bag after the other and
``cu_seqlens (B + 1,)`` their boundaries, so bag ``b`` is ``features[cu_seqlens[b]:cu_seqlens[b + 1]]``. Packing must
not change a bag's result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from attention.base import AttentionModule
from attention.cost import Part
from kernels.errors import InputError


@dataclass
class PooledBags:
    """What a pooler makes of ``B`` packed bags with ``T`` instances in all.

    Attributes:
        logits: (B, C) bag logits.
        embeddings: (B, E) bag features, the input of the last classifier.
        attention: (branches, T) scores before the softmax over each bag; a per-bag softmax gives the weights.
        extras: what the pooler's own loss needs beside these, by name.
    """

    logits: Tensor
    embeddings: Tensor
    attention: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """How logits meet targets, whatever the kind of target (see ``tasks.wsi_mil.targets``)."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of each row, (M,), for ``logits (M, C)`` and ``target (M, ...)``; class weights are already in it."""
        ...

    def active(self, target: Tensor) -> Tensor:
        """Which outputs are on for each row, (M, C) bool: one-hot for classes, many-hot for multi-label."""
        ...


class Pooler(AttentionModule):
    """Base of the poolers: the forward contract and the plain bag loss.

    ``attention_rows`` says what the rows of ``PooledBags.attention`` are: ``"branch"`` (average their softmaxes for one
    map) or ``"class"`` (take the row of the class in question).
    """

    attention_rows: Literal["branch", "class"] = "branch"

    def forward(self, features: Tensor, cu_seqlens: Tensor) -> PooledBags:
        """Pool ``features (T, D)`` with boundaries ``cu_seqlens (B + 1,)`` int32 or int64; empty bags are allowed."""
        raise NotImplementedError

    def loss(self, bags: PooledBags, target: Tensor, cu_seqlens: Tensor, objective: Objective) -> dict[str, Tensor]:
        """Training loss terms by name, each a scalar; ``"total"`` is what is minimised, the others are logged."""
        bag = objective.loss(bags.logits, target).mean()
        return {"bag": bag, "total": bag}


def weighted_sums(name: str, bags: float, instances: float, rows: int, dim: int) -> Part:
    """The cost of summing the features of each bag, of size ``dim``, with ``rows`` weights for each instance."""
    return Part(name, 2 * instances * rows * dim, instances * (dim + rows) + bags * rows * dim)


def default_hidden_dim(dim: int) -> int:
    """Inner width for features of size ``dim``: the pairs of the ACMIL paper (384/128, 512/256, 1024/512, 1536/768)."""
    return 128 if dim == 384 else max(dim // 2, 8)


def check_features(features: Tensor, dim: int, pooler: str) -> None:
    """Refuse features of another size than the pooler was built for.

    Raises:
        InputError: naming both sizes.
    """
    if features.ndim != 2 or features.shape[1] != dim:
        raise InputError(
            f"attention '{pooler}' was built for features of size {dim} and got {tuple(features.shape)}; "
            "use features of the encoder the model was trained on, or set dim to their size."
        )


def strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without the ``module.`` and ``model.`` that training wrappers put before every name."""
    for prefix in ("module.", "model.", "module."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def rename(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """``state`` with the names that are keys of ``names`` replaced; the rest is kept, so that it is reported."""
    return {names.get(key, key): value for key, value in state.items()}


def join(state: dict[str, Tensor], name: str, parts: Sequence[str], stack: bool = False) -> None:
    """Replace the tensors ``parts`` of ``state`` by one called ``name``, end to end or stacked, if all are there."""
    if parts and all(part in state for part in parts):
        tensors = [state.pop(part) for part in parts]
        state[name] = torch.stack(tensors) if stack else torch.cat(tensors)


def numbered(state: Mapping[str, Tensor], pattern: str) -> list[str]:
    """The names ``pattern.format(0), pattern.format(1), ...`` as far as ``state`` has them."""
    names: list[str] = []
    while pattern.format(len(names)) in state:
        names.append(pattern.format(len(names)))
    return names

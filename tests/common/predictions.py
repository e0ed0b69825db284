"""Made-up predictions for the tests of metrics, intervals and pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def make_predictions(
    kind: str, n: int = 60, c: int = 3, seed: int = 0, rounded: bool = False
) -> tuple[NDArray, NDArray]:
    """Probabilities that know something of the targets; ``rounded`` ones tie often."""
    rng = np.random.default_rng(seed)
    c = 2 if kind == "binary" else c
    if kind == "multilabel":
        targets = (rng.random((n, c)) < 0.4).astype(int)
        p = np.clip(0.35 * targets + 0.65 * rng.random((n, c)), 0, 1)
        return (np.round(p, 1) if rounded else p), targets
    targets = rng.integers(c, size=n)
    logits = rng.normal(size=(n, c)) + 1.2 * np.eye(c)[targets]
    if rounded:
        logits = np.round(logits)
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), targets

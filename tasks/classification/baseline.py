"""What colour alone tells: a linear classifier on the mean of red, green and blue, on the same folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tasks.classification.data import ImageSet
from tasks.common.crossval import Fold


def colour_baseline(
    images: ImageSet, colours: Mapping[str, NDArray[np.float64]], folds: Sequence[Fold]
) -> dict[str, Any]:
    """Accuracy and balanced accuracy on all test images together, of the classifier and of naming the largest class.

    Args:
        colours: case id -> (3,) mean colour.
    """
    truth, guessed, largest = [], [], []
    for fold in folds:
        train, test = images.select([*fold.train, *fold.val]), images.select(fold.test)
        x, y = np.stack([colours[s.case_id] for s in train]), images.labels(train)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
        guessed.append(model.predict(np.stack([colours[s.case_id] for s in test])))
        largest.append(np.full(len(test), np.bincount(y).argmax()))
        truth.append(images.labels(test))
    t, p, most = (np.concatenate(parts) for parts in (truth, guessed, largest))
    recall = [float((p[t == c] == c).mean()) for c in np.unique(t)]
    return {
        "what": "logistic regression on the mean colour of an image, same folds",
        "accuracy": float((p == t).mean()),
        "balanced_accuracy": float(np.mean(recall)),
        "largest_class": float((most == t).mean()),
    }

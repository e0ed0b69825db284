"""Every lesion or cell on its own: components of two masks, matched one to one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from kernels.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SMALLEST_VOXELS = 50
LEAST_DICE = 0.1


@dataclass(frozen=True)
class Objects:
    """The components of a reference and a predicted mask, and which belong together.

    Attributes:
        reference_sizes: (r,) voxels of each component of the reference that was large enough.
        predicted_sizes: (p,).
        pairs: (m, 2) matched components, row and column of the two arrays above, ascending.
        dice, recall, precision: (m,) overlap of each pair; recall is the share of the reference's component.
    """

    reference_sizes: Ints
    predicted_sizes: Ints
    pairs: Ints
    dice: Floats
    recall: Floats
    precision: Floats

    @property
    def found(self) -> NDArray[np.bool_]:
        """(r,) whether each component of the reference has a partner."""
        flags = np.zeros(len(self.reference_sizes), dtype=bool)
        flags[self.pairs[:, 0]] = True
        return flags

    def metrics(self) -> dict[str, float]:
        """Share of objects found, share of predicted ones that are right, F1; mean and SD of the pairs' overlap.

        ``recall``, ``precision`` and ``f1`` count objects and are NaN where there are none to count. ``object_dice``,
        ``object_recall``, ``object_precision`` are means over pairs, ``..._sd`` their population SD; NaN without pairs.
        """
        m, r, p = len(self.pairs), len(self.reference_sizes), len(self.predicted_sizes)
        nan = float("nan")
        values = {
            "recall": m / r if r else nan,
            "precision": m / p if p else nan,
            "f1": 2 * m / (r + p) if r + p else nan,
        }
        for name in ("dice", "recall", "precision"):
            overlap: Floats = getattr(self, name)
            values[f"object_{name}"] = float(overlap.mean()) if m else nan
            values[f"object_{name}_sd"] = float(overlap.std()) if m else nan
        return values


def match_objects(
    predicted: ArrayLike,
    reference: ArrayLike,
    min_voxels: int = SMALLEST_VOXELS,
    min_ml: float | None = None,
    voxel_ml: float | None = None,
    least_dice: float = LEAST_DICE,
) -> Objects:
    """Components of both masks, paired one to one so that the sum of their Dice is largest.

    Components are joined through faces (edges in 2-D); those below the smallest size are dropped on both sides, and
    pairs whose Dice is not above ``least_dice`` are no pairs.

    Source: the object-wise evaluation of the Raidionics validation library (50 voxels, Dice above 0.1).

    Args:
        predicted, reference: (\\*spatial) masks of one structure; anything but 0 is inside.
        min_voxels: smallest size that counts.
        min_ml: the same as a volume, which takes the place of ``min_voxels``; needs ``voxel_ml``.
        voxel_ml: volume of a voxel in ml.

    Raises:
        InputError: shapes differ, a mask holds NaN, or ``min_ml`` comes without ``voxel_ml``.

    >>> two = np.array([[1, 1, 0, 1, 1], [1, 1, 0, 1, 1]])
    >>> match_objects([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0]], two, min_voxels=2).metrics()["recall"]
    0.5
    """
    p, r = np.asarray(predicted), np.asarray(reference)
    if p.shape != r.shape:
        raise InputError(f"predicted {p.shape} and reference {r.shape} must have one shape.")
    if (p.dtype.kind == "f" and np.isnan(p).any()) or (r.dtype.kind == "f" and np.isnan(r).any()):
        raise InputError("a mask holds NaN; cut probabilities at a threshold first.")
    if min_ml is not None and voxel_ml is None:
        raise InputError(f"a smallest size of {min_ml} ml needs the volume of a voxel in ml.")
    smallest = min_voxels if min_ml is None or voxel_ml is None else min_ml / voxel_ml
    p_labels, p_sizes = _components(p, smallest)
    r_labels, r_sizes = _components(r, smallest)
    pairs, shared = _overlaps(r_labels, p_labels, len(p_sizes))
    dice = 2 * shared / (r_sizes[pairs[:, 0]] + p_sizes[pairs[:, 1]])
    chosen = _best_assignment(pairs, dice, len(r_sizes), len(p_sizes))
    chosen = chosen[dice[chosen] > least_dice]
    pairs, shared, dice = pairs[chosen], shared[chosen], dice[chosen]
    return Objects(r_sizes, p_sizes, pairs, dice, shared / r_sizes[pairs[:, 0]], shared / p_sizes[pairs[:, 1]])


def _components(mask: NDArray, smallest: float) -> tuple[NDArray, Ints]:
    """Labels, 0 for background and for components that are too small, and sizes of labels 1, 2, ..."""
    labels, count = label(mask != 0)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    kept = sizes >= smallest
    kept[0] = False
    renumbered = np.where(kept, np.cumsum(kept), 0).astype(labels.dtype)
    return renumbered[labels], sizes[kept]


def _overlaps(reference: NDArray, predicted: NDArray, num_predicted: int) -> tuple[Ints, Ints]:
    """Pairs (m, 2) of components that share voxels, ascending, and how many (m,)."""
    both = (reference > 0) & (predicted > 0)
    code = (reference[both].astype(np.int64) - 1) * num_predicted + predicted[both] - 1
    code, shared = np.unique(code, return_counts=True)
    return np.stack(np.divmod(code, max(num_predicted, 1)), axis=1), shared


def _best_assignment(pairs: Ints, dice: Floats, num_reference: int, num_predicted: int) -> Ints:
    """Rows of ``pairs``, ascending, that together have the largest Dice with no component twice.

    Components that touch no common third one fall into clusters of their own; the many clusters of one pair are taken
    as they are, and the matrix of an assignment is never larger than a cluster.
    """
    if not len(pairs):
        return np.zeros(0, dtype=np.int64)
    nodes = num_reference + num_predicted
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1] + num_reference)), shape=(nodes, nodes))
    cluster = connected_components(links, directed=False)[1][pairs[:, 0]]
    size = np.bincount(cluster)
    chosen = [np.flatnonzero(size[cluster] == 1)]
    shared = np.flatnonzero(size[cluster] > 1)
    order = shared[np.argsort(cluster[shared], kind="stable")]
    for rows in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        if len(rows):
            chosen.append(rows[_assign(pairs[rows], dice[rows])])
    return np.sort(np.concatenate(chosen))


def _assign(pairs: Ints, dice: Floats) -> Ints:
    """Rows of the best assignment within one cluster."""
    (_, row), (_, column) = (np.unique(pairs[:, k], return_inverse=True) for k in (0, 1))
    table = np.zeros((row.max() + 1, column.max() + 1))
    table[row, column] = dice
    best = linear_sum_assignment(table, maximize=True)
    where = np.full(table.shape, -1)
    where[row, column] = np.arange(len(pairs))
    index = where[best]
    return index[index >= 0]

"""Overlap of predicted and reference masks, per case and class: Dice, IoU, sensitivity, precision, volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kernels.errors import InputError, unknown_name

EmptyRule = Literal["one", "zero", "nan", "raidionics", "qtseg"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray | Tensor

_BLOCK = 4_000_000  # places counted at once: their 64-bit codes take 32 MB


@dataclass(frozen=True)
class Counts:
    """Places by what they are in prediction and reference, one array of any shape each, commonly (n, classes)."""

    tp: Ints
    fp: Ints
    fn: Ints
    tn: Ints


def overlap_metrics(
    predicted: Mask,
    reference: Mask,
    *,
    empty: EmptyRule,
    num_classes: int = 2,
    region: Mask | None = None,
    voxel_ml: ArrayLike | None = None,
) -> dict[str, NDArray]:
    """Every overlap metric of every case and foreground class.

    Args:
        predicted: (n, \\*spatial) class of each place; 2-D, 3-D or any other number of axes.
        reference: as ``predicted``; places with a negative class are not counted.
        empty: the value where a ratio is nothing by nothing, see :func:`overlap_ratios`.
        num_classes: K, with the background 0.
        region: (n, \\*spatial) or (\\*spatial) true where places count, such as the field of view; all by default.
        voxel_ml: volume of a voxel in ml, one for all or (n,); adds ``reference_ml`` and ``predicted_ml``.

    Returns:
        The ratios of :func:`overlap_ratios`, ``reference_voxels`` and ``predicted_voxels``, each (n, K - 1).

    Raises:
        InputError: shapes differ, or a mask holds NaN, fractions or classes that do not exist.

    >>> found = overlap_metrics(np.array([[1, 1, 0, 0]]), np.array([[0, 1, 1, 0]]), empty="nan")
    >>> found["dice"], found["predicted_voxels"]
    (array([[0.5]]), array([[2]]))
    """
    counts = class_counts(confusion_matrices(predicted, reference, num_classes, region))
    counts = Counts(*(part[:, 1:] for part in (counts.tp, counts.fp, counts.fn, counts.tn)))
    found: dict[str, NDArray] = dict(overlap_ratios(counts, empty))
    found["reference_voxels"], found["predicted_voxels"] = counts.tp + counts.fn, counts.tp + counts.fp
    if voxel_ml is not None:
        each = np.broadcast_to(np.asarray(voxel_ml, dtype=np.float64), len(counts.tp))[:, None]
        for side in ("reference", "predicted"):
            found[f"{side}_ml"] = found[f"{side}_voxels"] * each
    return found


def overlap_ratios(counts: Counts, empty: EmptyRule) -> dict[str, Floats]:
    """Dice, IoU, sensitivity, specificity, precision, accuracy and mean absolute error, of the shape of the counts.

    What a ratio is when a mask is empty, by ``empty``:

    ============  =====================  ========================================================
    rule          both masks empty       one mask empty
    ============  =====================  ========================================================
    one           1                      0
    zero          0                      0
    nan           NaN                    Dice and IoU 0; NaN for a ratio that divides by nothing
    raidionics    0                      0 (the same as ``zero``)
    qtseg         1                      tp of zero taken as 1: Dice 2 / (2 + fp + fn), and so on
    ============  =====================  ========================================================

    The rule is about Dice, IoU, sensitivity and precision. Specificity is NaN where nothing is negative in the
    reference, accuracy and mean absolute error where nothing is counted. ``mae`` is that of hard masks, hence
    1 - accuracy (under ``qtseg`` of the counts as they are); that of probabilities is :func:`mean_absolute_error`.

    Source: ``raidionics``, Bouget et al., Frontiers in Neurology 13:932219, 2022; ``qtseg``, arXiv 2412.17241.
    """
    if empty not in get_args(EmptyRule):
        raise unknown_name("rule for empty masks", empty, get_args(EmptyRule))
    tp = np.maximum(counts.tp, 1) if empty == "qtseg" else counts.tp
    fp, fn, tn = counts.fp, counts.fn, counts.tn
    both = tp + fp + fn == 0
    missing = np.nan if empty == "nan" else 0.0
    of_nothing = np.where(both, 1.0 if empty == "one" else missing, missing)
    return {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn, of_nothing),
        "iou": _ratio(tp, tp + fp + fn, of_nothing),
        "sensitivity": _ratio(tp, tp + fn, of_nothing),
        "specificity": _ratio(tn, tn + fp),
        "precision": _ratio(tp, tp + fp, of_nothing),
        "accuracy": _ratio(tp + tn, tp + fp + fn + tn),
        "mae": _ratio(fp + fn, counts.tp + fp + fn + tn),
    }


def confusion_matrices(
    predicted: Mask, reference: Mask, num_classes: int = 2, region: Mask | None = None
) -> NDArray[np.int64]:
    """Counts (n, K, K) by reference class (rows) and predicted class (columns); arguments as in overlap_metrics."""
    p, r = _classes(predicted, "predicted", num_classes), _classes(reference, "reference", num_classes, ignored=True)
    if p.shape != r.shape or p.ndim < 2:
        raise InputError(
            f"predicted {tuple(p.shape)} and reference {tuple(r.shape)} must be masks (n, *spatial) of one shape; "
            "bring the prediction to the grid of the reference first."
        )
    r = r.to(p.device)
    n, size = len(p), p[0].numel() if len(p) else 0
    inside = None if region is None else _region(region, p).reshape(n, size)
    p, r = p.reshape(n, size), r.reshape(n, size)
    bins = num_classes**2 + 1  # the last one takes what does not count
    offset = bins * torch.arange(n, device=p.device)[:, None]
    total = torch.zeros(n * bins, dtype=torch.int64, device=p.device)
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, size, step):
        span = slice(start, start + step)
        of_reference = r[:, span].long()
        code = of_reference * num_classes + p[:, span].long()
        counted = of_reference >= 0 if inside is None else (of_reference >= 0) & inside[:, span]
        code = torch.where(counted, code, bins - 1) + offset
        total += torch.bincount(code.reshape(-1), minlength=n * bins)
    return total.view(n, bins)[:, :-1].reshape(n, num_classes, num_classes).cpu().numpy()


def class_counts(matrices: NDArray[np.int64]) -> Counts:
    """Each class against the rest (n, K), background included, from confusion matrices (n, K, K)."""
    tp = np.diagonal(matrices, axis1=1, axis2=2)
    fp, fn = matrices.sum(axis=1) - tp, matrices.sum(axis=2) - tp
    return Counts(tp, fp, fn, matrices.sum(axis=(1, 2))[:, None] - tp - fp - fn)


def mean_absolute_error(probabilities: Mask, reference: Mask, region: Mask | None = None) -> Floats:
    """Mean distance (n,) of the foreground probability from the reference, as saliency papers report it.

    Args:
        probabilities: (n, \\*spatial) in [0, 1].
        reference: (n, \\*spatial) 0 or 1.
        region: as in :func:`overlap_metrics`.
    """
    p, r = _tensor(probabilities), _classes(reference, "reference", 2)
    if p.shape != r.shape or p.ndim < 2:
        raise InputError(f"probabilities {tuple(p.shape)} and reference {tuple(r.shape)} must have one shape.")
    if not bool(p.isfinite().all()):
        raise InputError("the probabilities hold NaN or infinity; the model that made them has diverged.")
    n = len(p)
    inside = torch.ones_like(r, dtype=torch.bool) if region is None else _region(region, p)
    distance = ((p.double() - r.to(p.device).double()).abs() * inside).reshape(n, -1).sum(1)
    return (distance / inside.reshape(n, -1).sum(1)).cpu().numpy()


def voxel_volume_ml(affine: ArrayLike) -> float:
    """Volume of a voxel in ml, from the (4, 4) affine in millimetres; oblique and sheared grids included.

    >>> voxel_volume_ml(np.diag([1.0, -2.0, 3.0, 1.0]))
    0.006
    """
    matrix = np.asarray(affine, dtype=np.float64)
    volume = abs(float(np.linalg.det(matrix[:3, :3]))) / 1000 if matrix.shape == (4, 4) else 0.0
    if not np.isfinite(volume) or volume <= 0:
        raise InputError(f"the affine {matrix.tolist()} gives voxels without volume; repair the header of the file.")
    return round(volume, 15)


def _ratio(numerator: Ints, denominator: Ints, of_nothing: Floats | float = np.nan) -> Floats:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), of_nothing)


def _classes(mask: Mask, which: str, num_classes: int, ignored: bool = False) -> Tensor:
    """The mask as whole numbers below ``num_classes``."""
    values = _tensor(mask)
    if values.numel() == 0 or values.dtype == torch.bool:
        return values
    if values.is_floating_point() and not bool((values == values.round()).all() & values.isfinite().all()):
        raise InputError(f"the {which} mask holds fractions, NaN or infinity; cut probabilities at a threshold first.")
    low, high = (int(v) for v in values.aminmax())
    if high >= num_classes or (low < 0 and not ignored):
        raise InputError(f"the {which} mask holds classes {low} to {high}, but there are only 0 to {num_classes - 1}.")
    return values


def _region(region: Mask, like: Tensor) -> Tensor:
    inside = _tensor(region)
    if inside.shape not in (like.shape, like.shape[1:]):
        raise InputError(f"the region {tuple(inside.shape)} must have the shape {tuple(like.shape)} of the masks.")
    return (inside != 0).to(like.device).expand(like.shape)


def _tensor(mask: Mask) -> Tensor:
    """An array as a tensor, whatever its memory order, byte order and unsigned type; files' arrays are read-only."""
    if isinstance(mask, Tensor):
        return mask
    array = np.asarray(mask)
    kind = np.int64 if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(array, dtype=kind, requirements=["C", "W"]))

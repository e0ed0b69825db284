"""How well predicted volumes agree with reference volumes: Bland-Altman analysis and Lin's concordance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from kernels.errors import InputError, unknown_name
from tasks.common.bootstrap import Interval

Unit = Literal["absolute", "percent"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Bias and limits of agreement, each with its confidence interval.

    Attributes:
        bias: mean of predicted minus reference.
        bias_interval: by Student's t.
        sd: sample standard deviation of the differences.
        lower, upper: limits between which ``share`` of the differences are expected to lie.
        lower_interval, upper_interval: of the limits.
        share: of the differences, 0.95 for the customary 1.96 SD.
        unit: ``absolute`` (the unit of the volumes) or ``percent`` of the mean of both volumes.
        n: cases that count.
        left_out: cases without a percentage, because both volumes are 0.
    """

    bias: float
    bias_interval: Interval
    sd: float
    lower: float
    lower_interval: Interval
    upper: float
    upper_interval: Interval
    share: float
    unit: Unit
    n: int
    left_out: int


def bland_altman(
    predicted: ArrayLike, reference: ArrayLike, unit: Unit = "absolute", level: float = 0.95, share: float = 0.95
) -> Agreement:
    """Bland and Altman's limits of agreement of two measurements of the same cases, one row for each patient.

    The intervals of the limits take sqrt(1/n + z²/(2 (n - 1))) SD as their standard error; at n = 50 that is 0.25 SD.

    Source: Bland and Altman, "Measuring agreement in method comparison studies", Statistical Methods in Medical
    Research 8, 1999, sections 2.1 and 2.2.

    Args:
        predicted, reference: (n,) volumes.
        level: confidence of the intervals.
        share: of differences between the limits.

    Raises:
        InputError: lengths differ, a volume is negative, NaN or infinite, or fewer than two cases are left.

    >>> found = bland_altman([11.0, 21.0, 33.0, 39.0], [10.0, 20.0, 30.0, 40.0])
    >>> found.bias, round(found.sd, 3), round(found.lower, 3), round(found.upper, 3)
    (1.0, 1.633, -2.201, 4.201)
    """
    p, r = volume_pairs(predicted, reference)
    if unit not in get_args(Unit):
        raise unknown_name("unit of agreement", unit, get_args(Unit))
    if not (0 < level < 1 and 0 < share < 1):
        raise InputError(f"level={level} and share={share} must lie between 0 and 1.")
    _, difference = differences(p, r, unit)
    known = difference[~np.isnan(difference)]
    n = len(known)
    if n < 2:
        raise InputError(f"limits of agreement need at least two cases with a volume; there are {n}.")
    bias, sd = float(known.mean()), float(known.std(ddof=1))
    z, t = float(stats.norm.ppf((1 + share) / 2)), float(stats.t.ppf((1 + level) / 2, n - 1))
    of_bias, of_limit = t * sd * np.sqrt(1 / n), t * sd * np.sqrt(1 / n + z**2 / (2 * (n - 1)))
    lower, upper = bias - z * sd, bias + z * sd
    return Agreement(
        bias=bias,
        bias_interval=_around(bias, of_bias),
        sd=sd,
        lower=lower,
        lower_interval=_around(lower, of_limit),
        upper=upper,
        upper_interval=_around(upper, of_limit),
        share=share,
        unit=unit,
        n=n,
        left_out=len(difference) - n,
    )


def differences(predicted: Floats, reference: Floats, unit: Unit) -> tuple[Floats, Floats]:
    """Mean of both measurements and their difference (n,), the two axes of a Bland-Altman plot."""
    mean = (predicted + reference) / 2
    difference = predicted - reference
    if unit == "absolute":
        return mean, difference
    return mean, np.divide(100 * difference, mean, out=np.full(mean.shape, np.nan), where=mean > 0)


def lin_concordance(predicted: ArrayLike, reference: ArrayLike, level: float = 0.95) -> tuple[float, Interval]:
    """Lin's concordance correlation coefficient with its interval by the z transform.

    1 is agreement on the line of identity; unlike Pearson's coefficient it falls with any bias or scale. NaN where
    neither measurement varies, or for fewer than three cases; the interval is NaN too where the agreement is perfect.

    Source: Lin, "A concordance correlation coefficient to evaluate reproducibility", Biometrics 45, 1989, with the
    correction of 2000 (Biometrics 56).

    >>> round(lin_concordance([11.0, 21.0, 33.0, 39.0], [10.0, 20.0, 30.0, 40.0])[0], 4)
    0.9877
    """
    p, r = volume_pairs(predicted, reference)
    n = len(p)
    nothing = Interval(float("nan"), float("nan"))
    spread = p.var() + r.var() + (p.mean() - r.mean()) ** 2 if n else 0.0
    if n < 3 or spread == 0:
        return float("nan"), nothing
    coefficient = float(2 * ((p - p.mean()) * (r - r.mean())).mean() / spread)
    scales = float(np.sqrt(p.var() * r.var()))
    if scales == 0 or abs(coefficient) >= 1 - 1e-12 or coefficient == 0:
        return coefficient, nothing
    rho = coefficient * float(spread) / (2 * scales)
    shift = (p.mean() - r.mean()) ** 2 / scales
    c2, rest = coefficient**2, 1 - coefficient**2
    variance = (
        (1 - rho**2) * c2 / (rest * rho**2)
        + 2 * coefficient**3 * (1 - coefficient) * shift / (rho * rest**2)
        - coefficient**4 * shift**2 / (2 * rho**2 * rest**2)
    ) / (n - 2)
    half = float(stats.norm.ppf((1 + level) / 2)) * np.sqrt(max(variance, 0.0))
    centre = np.arctanh(coefficient)
    return coefficient, Interval(float(np.tanh(centre - half)), float(np.tanh(centre + half)))


def volume_pairs(predicted: ArrayLike, reference: ArrayLike) -> tuple[Floats, Floats]:
    """Both volumes as float64 (n,), checked."""
    p, r = np.asarray(predicted, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if p.shape != r.shape or p.ndim != 1:
        raise InputError(f"predicted volumes {p.shape} and reference volumes {r.shape} must be one for each case.")
    if not (np.isfinite(p) & np.isfinite(r) & (p >= 0) & (r >= 0)).all():
        raise InputError("a volume is negative, NaN or infinite; an empty mask has volume 0.")
    return p, r


def _around(value: float, half: float) -> Interval:
    return Interval(float(value - half), float(value + half))

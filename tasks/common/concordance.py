"""Harrell's concordance index of censored survival times."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def concordance_index(event: NDArray, time: NDArray, risk: NDArray, tied_tolerance: float = 1e-8) -> float:
    """Share of comparable pairs in which the higher risk has the earlier event; risks that tie count one half.

    Samples i and j are comparable when i has an event and j outlives it: ``time[j] > time[i]``, or the same time with j
    censored. NaN when no pair is comparable. Rows are handled in blocks, so memory stays linear in n.

    Source: Harrell, Lee and Mark, "Multivariable prognostic models", Statistics in Medicine 15, 1996.

    Args:
        event: (n,) bool, true where the event was observed and false where the sample was censored.
        time: (n,) time of event or of censoring.
        risk: (n,) predicted risk, higher is worse.
        tied_tolerance: risks no further apart than this tie.

    Raises:
        ValueError: lengths differ, or a time or risk is not finite.
    """
    observed = np.asarray(event, dtype=bool)
    t, r = np.asarray(time, dtype=np.float64), np.asarray(risk, dtype=np.float64)
    if not (observed.shape == t.shape == r.shape) or t.ndim != 1:
        raise ValueError(f"event, time and risk must be (n,) alike, not {observed.shape}, {t.shape}, {r.shape}")
    if not (np.isfinite(t).all() and np.isfinite(r).all()):
        raise ValueError("times and risks must be finite")
    pairs = concordant = 0.0
    for block in np.array_split(np.flatnonzero(observed), max(1, observed.sum() * len(t) // 4_000_000)):
        later = (t > t[block, None]) | ((t == t[block, None]) & ~observed)
        lead = r[block, None] - r
        tied = np.abs(lead) <= tied_tolerance
        pairs += later.sum()
        concordant += (later & ~tied & (lead > 0)).sum() + 0.5 * (later & tied).sum()
    return float(concordant / pairs) if pairs else float("nan")

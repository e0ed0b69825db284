"""A made table of segmented cases."""

import numpy as np
import pandas as pd


def make_cases(n: int = 60, seed: int = 0, scans: int = 2) -> pd.DataFrame:
    """Cases of patients with ``scans`` scans each, in 3 folds; small structures are missed more often; two healthy."""
    rng = np.random.default_rng(seed)
    volume = np.exp(rng.normal(1.2, 1.3, n))
    volume[:2] = 0
    dice = np.clip(rng.normal(0.85, 0.08, n), 0, 1) * (rng.random(n) < 1 - np.exp(-volume))
    dice[0] = np.nan
    predicted = np.where(dice > 0, volume * rng.normal(1, 0.1, n), 0)
    predicted[1] = 1.0
    patient = np.arange(n) // scans
    hd95 = np.where(dice > 0, rng.exponential(4, n), np.nan)
    return pd.DataFrame(
        {
            "case_id": [f"c{k:03}" for k in range(n)],
            "patient": [f"p{k:03}" for k in patient],
            "fold": patient % 3,
            "dice": dice,
            "hd95": hd95,
            "nsd_2mm": np.nan_to_num(dice),
            "dice/oedema": rng.random(n),
            "reference_ml": volume,
            "predicted_ml": predicted,
            "seconds": rng.random(n),
        }
    )

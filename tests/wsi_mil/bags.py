"""A cohort of feature files with a signal, for tests of everything after action=prepare."""

from pathlib import Path

import numpy as np

from tasks.wsi_mil.features import write_bag

DIM = 24


def write_cohort(folder: Path, num_slides: int = 24, classes: int = 2, seed: int = 0, strength: float = 3.0) -> None:
    """``features/*.h5`` and ``labels.csv``: a third of the tiles of class c > 0 are shifted along four axes.

    Slides come in pairs of one patient, so that a split by slide would leak.
    """
    rng = np.random.default_rng(seed)
    rows = ["slide_id,patient,label"]
    for i in range(num_slides):
        size, label = int(rng.integers(15, 60)), (i // 2) % classes
        features = rng.normal(size=(size, DIM)).astype("float32")
        features[: size // 3, 4 * label : 4 * label + 4] += strength * (label > 0)
        side = int(np.ceil(size**0.5))
        xy = np.stack([np.arange(size) % side, np.arange(size) // side], 1) * 224
        about = {"patch_size": 224, "patch_size_level0": 224, "level0_width": side * 224, "level0_height": side * 224}
        about |= {"encoder": "test", "weights": "none", "requested_mpp": 0.5, "overlap": 0, "level0_mpp": 0.5}
        write_bag(folder / "features" / f"{i:03d}.h5", features, xy, attributes=about)
        rows.append(f"{i:03d},p{i // 2},{'normal' if label == 0 else f'grade{label}'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")

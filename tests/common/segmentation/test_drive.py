"""The second observer of DRIVE, scored against the first inside the field of view, has the published figures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.common.segmentation.overlap import overlap_metrics
from tasks.common.segmentation.ranking import centreline_dice


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image) > 0


def test_the_second_observer_scores_what_is_published(shared_data: Path) -> None:
    folder = shared_data / "seg2d" / "drive" / "test"
    if not folder.is_dir():
        pytest.skip("DRIVE is not there")
    first, second, field = (
        np.stack([read(path) for path in sorted((folder / name).glob("*.gif"))])
        for name in ("1st_manual", "2nd_manual", "mask")
    )
    found = overlap_metrics(second, first, empty="nan", region=field)
    # Staal et al., IEEE Transactions on Medical Imaging 23, 2004, give this accuracy of the second observer; later
    # papers cite the other two.
    means = [np.mean(found[name]) for name in ("accuracy", "sensitivity", "specificity")]
    assert means == pytest.approx([0.9473, 0.7760, 0.9725], abs=1e-4)
    lines = centreline_dice(second[0], first[0], field[0])
    assert 0.7 < lines["cldice"] < 0.9

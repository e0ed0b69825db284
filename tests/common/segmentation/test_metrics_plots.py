"""Each picture shows the numbers it was given."""

import subprocess
import sys

import numpy as np
import pytest

from kernels.errors import InputError
from tasks.common.plots import png_bytes
from tasks.common.segmentation import metrics_plots as plots
from tasks.common.segmentation.agreement import bland_altman
from tasks.common.segmentation.ranking import rank_pixels
from tasks.common.segmentation.summary import summarise_cases
from tests.common.segmentation.cases import make_cases

CASES = make_cases(40)


@pytest.mark.parametrize("unit", ["absolute", "percent"])
def test_bland_altman_draws_bias_and_limits(unit: str) -> None:
    p, r = CASES["predicted_ml"], CASES["reference_ml"]
    figure = plots.bland_altman_plot(p, r, unit)  # type: ignore[arg-type]
    axes = figure.axes[0]
    found = bland_altman(p, r, unit)  # type: ignore[arg-type]
    assert [line.get_ydata()[0] for line in axes.get_lines()[1:]] == [found.upper, found.bias, found.lower]
    assert ("%" if unit == "percent" else "ml") in axes.get_ylabel()
    assert png_bytes(figure)[:4] == b"\x89PNG"


def test_dice_by_volume_marks_the_missed_and_the_limit() -> None:
    figure = plots.dice_by_volume(CASES["dice"], CASES["reference_ml"], 3.0)
    axes = figure.axes[0]
    shown = CASES[(CASES["reference_ml"] > 0) & CASES["dice"].notna()]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"found ({(shown['dice'] > 0).sum()})", f"missed ({(shown['dice'] == 0).sum()})"]
    medians = [line.get_ydata()[0] for line in axes.get_lines() if line.get_color() == "black"]
    classes = (shown[shown["reference_ml"] < 3], shown[shown["reference_ml"] >= 3])
    assert medians == [part["dice"].median() for part in classes]
    assert axes.get_xscale() == "log"
    assert png_bytes(figure)
    assert png_bytes(plots.dice_by_volume([np.nan], [0.0]))


def test_recall_by_volume_has_a_bar_and_an_interval_for_each_class() -> None:
    summary = summarise_cases(CASES, num_samples=50)
    figure = plots.recall_by_volume(summary)
    axes = figure.axes[0]
    recalls = [part["pooled"]["patient_recall"] for part in summary["by_volume"].values()]
    assert [bar.get_height() for bar in axes.patches] == [r["value"] for r in recalls]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[r["low"], r["high"]] for r in recalls]
    assert png_bytes(figure)
    with pytest.raises(InputError, match="no volume classes"):
        plots.recall_by_volume({})


def test_every_case_of_a_fold_is_a_point() -> None:
    figure = plots.metric_per_fold(CASES)
    axes = figure.axes[0]
    points = [line.get_ydata() for line in axes.get_lines() if line.get_marker() == "o"]
    for fold, values in enumerate(points):
        assert sorted(values) == sorted(CASES.loc[CASES["fold"] == fold, "dice"].dropna())
    assert [text.get_text() for text in axes.get_xticklabels()] == ["fold 0", "fold 1", "fold 2"]
    assert png_bytes(figure)
    with pytest.raises(InputError, match="no column 'hd99'"):
        plots.metric_per_fold(CASES, "hd99")


def test_pixel_curves_name_their_areas() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(900) < 0.2
    ranked = rank_pixels(rng.normal(truth), truth)
    figure = plots.pixel_curves({"vessels": ranked})
    texts = [axes.get_legend().get_texts()[0].get_text() for axes in figure.axes]
    assert texts == [f"vessels  AUC {ranked.auc:.4f}", f"vessels  AP {ranked.average_precision:.4f}"]
    assert png_bytes(figure)


def test_drawing_needs_no_pyplot() -> None:
    program = (
        "import sys; from tasks.common.segmentation import metrics_plots as p;"
        "p.dice_by_volume([.5,.2], [1, 9]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

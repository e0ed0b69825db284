"""Each picture shows the numbers it was given; the global state of matplotlib is left alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from sklearn import metrics as sk

from kernels.errors import InputError
from tasks.common import plots
from tasks.common.bootstrap import Interval, bootstrap_intervals
from tasks.common.metrics import classification_metrics
from tests.common.predictions import make_predictions

KINDS = ["binary", "multiclass", "multilabel", "ordinal"]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def thick_lines(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(line.get_data()) for line in figure.axes[0].get_lines() if line.get_linewidth() == 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draw", [plots.roc_curves, plots.precision_recall_curves])
def test_curves_name_each_class_with_its_area(kind: str, draw: object) -> None:
    p, t = make_predictions(kind, 60)
    names = ["first", "second", "third"][: p.shape[1]]
    folds = np.arange(60) % 4
    figure = draw(p, t, kind, names, folds, [f"p{i // 2}" for i in range(60)])  # type: ignore[operator]
    drawn = names[1:] if kind == "binary" else names
    assert [text.split("  ")[0] for text in legend(figure)] == drawn
    thin = [line for line in figure.axes[0].get_lines() if line.get_linewidth() == 0.8 and line.get_alpha() == 0.3]
    assert len(thin) == 4 * len(drawn)
    assert len(figure.axes[0].collections) == len(drawn)  # bands


def test_the_roc_curve_is_that_of_scikit_learn() -> None:
    p, t = make_predictions("binary", 80, rounded=True)
    figure = plots.roc_curves(p, t, "binary")
    x, y = thick_lines(figure)[0]
    fpr, tpr, _ = sk.roc_curve(t, p[:, 1], drop_intermediate=False)
    assert x == pytest.approx(fpr)
    assert y == pytest.approx(tpr)
    assert legend(figure) == [f"class 1  AUC {sk.roc_auc_score(t, p[:, 1]):.3f}"]


def test_the_precision_recall_curve_is_that_of_scikit_learn() -> None:
    p, t = make_predictions("binary", 80, rounded=True)
    x, y = thick_lines(plots.precision_recall_curves(p, t, "binary"))[0]
    precision, recall, _ = sk.precision_recall_curve(t, p[:, 1])
    reached = slice(np.flatnonzero(recall == 1)[-1], -1)  # from the threshold that finds all positives
    assert x[1:] == pytest.approx(recall[reached][::-1])
    assert y[1:] == pytest.approx(precision[reached][::-1])
    assert np.sum(np.diff(x) * y[1:]) == pytest.approx(sk.average_precision_score(t, p[:, 1]))


@pytest.mark.parametrize("draw", [plots.roc_curves, plots.precision_recall_curves])
def test_the_band_holds_the_curve(draw: object) -> None:
    p, t = make_predictions("binary", 150)
    figure = draw(p, t, "binary")  # type: ignore[operator]
    x, y = thick_lines(figure)[0]
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    for at in (0.25, 0.5, 0.75):
        near = corners[np.abs(corners[:, 0] - at) < 1e-6, 1]
        on_curve = np.interp(at, x, y)
        assert near.min() - 0.02 <= on_curve <= near.max() + 0.02
        assert near.max() - near.min() < 0.5


def test_curves_of_one_class_say_so() -> None:
    figure = plots.roc_curves(np.full((4, 2), 0.5), np.zeros(4, int), "binary")
    assert "only one class is present" in [text.get_text() for text in figure.axes[0].texts]


def test_a_class_has_one_colour_everywhere() -> None:
    p, t = make_predictions("multiclass", 60, 10)
    lines = [line for line in plots.roc_curves(p, t, "multiclass").axes[0].get_lines() if line.get_linewidth() == 2]
    assert [to_hex(line.get_color()).upper() for line in lines] == [plots.class_colour(i) for i in range(10)]
    assert lines[0].get_linestyle() != lines[8].get_linestyle()  # the same colour again, another line
    assert len(set(plots.PALETTE)) == len(plots.PALETTE)


def test_the_confusion_matrix_shows_counts_and_shares() -> None:
    p = np.eye(3)[[0, 0, 1, 1, 2, 0]]
    figure = plots.confusion_matrix(p, np.array([0, 0, 1, 0, 2, 2]), "multiclass", ["a", "b", "c"])
    texts = {tuple(text.get_position()): text.get_text() for text in figure.axes[0].texts}
    assert texts[0, 0] == "2\n67%"  # predicted a, true a
    assert texts[1, 0] == "1\n33%"  # predicted b, true a
    assert texts[0, 2] == "1\n50%"
    assert texts[2, 1] == "0\n0%"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_each_label_has_a_matrix_of_its_own() -> None:
    p, t = make_predictions("multilabel", 30, 5)
    figure = plots.confusion_matrix(p, t, "multilabel", list("abcde"))
    assert [axes.get_title() for axes in figure.axes] == list("abcde")
    counts = [int(text.get_text().split("\n")[0]) for text in figure.axes[3].texts]
    assert counts == sk.confusion_matrix(t[:, 3], p[:, 3] > 0.5).ravel().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_calibration_curve_counts_every_prediction_and_shows_the_metric(kind: str) -> None:
    p, t = make_predictions(kind, 90)
    figure = plots.calibration_curve(p, t, kind)
    errors = [float(text.split("ECE ")[1]) for text in legend(figure)]
    assert np.mean(errors) == pytest.approx(classification_metrics(p, t, kind)["calibration_error"], abs=1e-3)
    counted = sum(patch.get_height() for patch in figure.axes[1].patches)
    assert counted == 90 * len(errors)


def history() -> pd.DataFrame:
    rows = []
    for fold in (0, 1):
        for epoch in range(5):
            rows.append({"fold": fold, "epoch": epoch, "train_loss": 1 / (epoch + 1)})  # as sparse as Lightning's file
            rows.append({"fold": fold, "epoch": epoch, "val_loss": abs(epoch - 2 - fold) + 0.1, "val_auc": 0.1 * epoch})
    return pd.DataFrame(rows)


def marked(figure: Figure, panel: int) -> list[tuple[float, float]]:
    dots = [line for line in figure.axes[panel].get_lines() if line.get_marker() == "o"]
    return [(float(d.get_xdata()[0]), float(d.get_ydata()[0])) for d in dots]


def test_learning_curves_mark_the_best_epoch_of_each_fold(tmp_path: Path) -> None:
    figure = plots.learning_curves(history())
    assert [axes.get_ylabel() for axes in figure.axes] == ["Loss", "Validation AUC"]
    assert marked(figure, 0) == [(2, pytest.approx(0.1)), (3, pytest.approx(0.1))]
    assert [x for x, _ in marked(figure, 1)] == [2, 3]
    assert [x for x, _ in marked(plots.learning_curves(history(), "val_auc"), 1)] == [4, 4]
    assert [x for x, _ in marked(plots.learning_curves(history(), best_epochs={0: 1}), 1)] == [1]
    path = tmp_path / "metrics.csv"
    history().drop(columns="fold").to_csv(path, index=False)
    assert len(marked(plots.learning_curves(path), 0)) == 1


def test_a_history_with_nothing_to_draw_is_a_sentence() -> None:
    with pytest.raises(InputError, match="no column 'epoch'; it has loss"):
        plots.learning_curves(pd.DataFrame({"loss": [1.0]}))
    with pytest.raises(InputError, match="neither losses nor validation metrics"):
        plots.learning_curves(pd.DataFrame({"epoch": [1], "lr": [0.1]}))


def test_fold_metrics_show_every_fold_and_the_interval() -> None:
    p, t = make_predictions("binary", 60)
    per_fold = [classification_metrics(p[k::3], t[k::3], "binary") for k in range(3)]
    pooled = classification_metrics(p, t, "binary")
    figure = plots.fold_metrics(per_fold, pooled, bootstrap_intervals(p, t, "binary", num_samples=50))
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["AUC", "Average precision", "F1 (macro)", "Accuracy", "Balanced accuracy", "Cohen's κ"]
    figure = plots.fold_metrics(per_fold, pooled, {"auc": Interval(0.6, 0.8)}, ["auc"])
    lines = [line.get_xdata() for line in figure.axes[0].get_lines()]
    assert list(lines[0]) == [fold["auc"] for fold in per_fold]
    assert list(lines[1]) == [0.6, 0.8]
    assert lines[2][0] == pooled["auc"]


def test_a_saved_picture_has_its_resolution_and_names_no_temporary_file(tmp_path: Path) -> None:
    p, t = make_predictions("binary", 20)
    path = plots.save_png(plots.confusion_matrix(p, t, "binary", ["a", "b"]), tmp_path / "new" / "cm.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert [child.name for child in path.parent.iterdir()] == ["cm.png"]


def test_drawing_needs_no_pyplot() -> None:
    program = (
        "import sys, numpy as np; from tasks.common import plots;"
        "plots.png_bytes(plots.roc_curves(np.array([[.9,.1],[.2,.8]]), np.array([0,1]), 'binary'));"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

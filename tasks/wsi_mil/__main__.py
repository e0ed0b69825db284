"""``python -m tasks.wsi_mil``: prepare slides, train, evaluate, predict. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import unknown_name
from tasks.common.cli import Task, main

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES = (
    ("+attention=acmil", "the demo: makes slides, tiles and features, trains, writes a report"),
    ("action=prepare data.slides=DIR data.mpp=0.5 data.tile=224 backbone=resnet18 out=DIR", "tissue, tiles, features"),
    ("+attention=acmil data.features=DIR data.labels=labels.csv", "k-fold cross-validation and a report"),
    ("-m +attention=abmil,acmil,clam_sb,transmil data.features=DIR data.labels=labels.csv", "compare poolers"),
    ("action=evaluate checkpoint=RUN data.features=DIR data.labels=labels.csv", "a trained model on a labelled cohort"),
    ("action=predict checkpoint=RUN input=slide.svs", "probabilities, heat map PNG, GeoJSON, top tiles"),
    ("data=mil_benchmark data.path=musk1.npz +attention=gated_abmil", "5 x 10-fold on a classic MIL data set"),
)


def run(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Do what ``action`` says; imports come late so that a mistyped option is answered at once."""
    match cfg.action:
        case "prepare":
            from tasks.wsi_mil import prepare

            prepare.run(cfg)
        case "train" if cfg.data.kind == "demo":
            from tasks.wsi_mil.demo import run as demo

            return demo.run(cfg, out)
        case "train" if cfg.data.kind == "mil_benchmark":
            from tasks.wsi_mil import benchmark

            return benchmark.run(cfg, out)
        case "train":
            from tasks.wsi_mil import train

            return train.run(cfg, out)
        case "evaluate":
            from tasks.wsi_mil import evaluate

            return evaluate.run(cfg, out)
        case "predict":
            from tasks.wsi_mil import predict

            predict.run(cfg, out)
        case other:
            raise unknown_name("action", str(other), ["prepare", "train", "evaluate", "predict"])
    return None


def demo_when_no_data_are_named(overrides: list[str]) -> list[str]:
    """``data=demo`` for training without data, and a fixed folder for prepare, whose work is kept between calls."""
    keys = {override.lstrip("+").split("=")[0]: override.partition("=")[2] for override in overrides}
    action = keys.get("action", "train")
    if action == "prepare" and "out" not in keys:
        return [*overrides, "out=outputs/wsi_mil/prepared"]
    named = {"data", "data.slides", "data.features", "data.labels"} & set(keys)
    return [*overrides, "data=demo"] if action == "train" and not named else overrides


TASK = Task(
    name="wsi_mil",
    run=run,
    groups=("attention", "backbone", "data", "trainer", "kernels"),
    examples=EXAMPLES,
    adjust=demo_when_no_data_are_named,
    choices={"data": ("cohort", "demo", "mil_benchmark")},
    help_files=("data/cohort.yaml", "predict/default.yaml", "kernels/auto.yaml"),
)

if __name__ == "__main__":
    sys.exit(main(TASK))

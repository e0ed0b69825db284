"""``python -m tasks.classification``: train, evaluate and predict with any backbone. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import unknown_name
from tasks.common.cli import Task, data_as_path, main

if TYPE_CHECKING:
    from omegaconf import DictConfig

DATA = ("images", "textures")
DEMO_BACKBONE = "test_resnet"  # the smallest of timm's residual networks
EXAMPLES = (
    ("", "the demo: paints images of four tissues, trains, writes a report"),
    ("backbone=resnet18 data.path=FOLDER", "5-fold cross-validation; FOLDER has one folder per class, or is a CSV"),
    ("backbone=resnet18 +attention=ela data.path=FOLDER", "with a gate after every stage"),
    (
        "backbone=vit_small_patch16_224 +attention=neighborhood data.path=FOLDER data.img_size=128",
        "with another mixer in the place of the blocks' attention",
    ),
    (
        "-m backbone=resnet18,convnext_tiny data.path=FOLDER",
        "compare accuracy, parameters, operations, speed",
    ),
    (
        "action=evaluate checkpoint=RUN/fold_00 data.path=FOLDER evaluation.unseen=true",
        "a fold's test images again",
    ),
    ("action=predict checkpoint=RUN input=FOLDER", "class probabilities of new images"),
)


def run(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Do what ``action`` says; imports come late so that a mistyped option is answered at once."""
    match cfg.action:
        case "train" if cfg.data.kind == "textures":
            from tasks.classification.demo import run as demo

            return demo.run(cfg, out)
        case "train":
            from tasks.classification import train

            return train.run(cfg, out)
        case "evaluate":
            from tasks.classification import evaluate

            return evaluate.run(cfg, out)
        case "predict":
            from tasks.classification import predict

            predict.run(cfg, out)
        case other:
            raise unknown_name("action", str(other), ["train", "evaluate", "predict"])
    return None


def adjust(overrides: list[str]) -> list[str]:
    """``data=FOLDER`` becomes ``data.path=FOLDER``; training without data is the demo, with a small backbone."""
    overrides = data_as_path(overrides, DATA)
    keys = {override.lstrip("+").split("=")[0]: override.partition("=")[2] for override in overrides}
    if keys.get("action", "train") == "train" and not {"data", "data.path"} & keys.keys():
        overrides, keys["data"] = [*overrides, "data=textures"], "textures"
    if keys.get("data") == "textures" and "backbone" not in keys:
        overrides = [*overrides, f"backbone={DEMO_BACKBONE}"]
    return overrides


TASK = Task(
    name="classification",
    run=run,
    groups=("attention", "backbone", "data", "trainer", "kernels"),
    examples=EXAMPLES,
    adjust=adjust,
    choices={"data": DATA},
    help_files=("data/images.yaml", "kernels/auto.yaml"),
)

if __name__ == "__main__":
    sys.exit(main(TASK))

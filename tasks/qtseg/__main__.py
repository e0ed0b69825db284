"""``python -m tasks.qtseg``: train, evaluate and predict on 2-D images, and export to ONNX. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import unknown_name
from tasks.common.cli import Task, data_as_path, main

if TYPE_CHECKING:
    from omegaconf import DictConfig

DATA = ("segmentation2d", "shapes2d")
ACTIONS = ("train", "evaluate", "predict", "export")
# A width for pictures of 128 pixels; at the published one the demo takes four times as long and is no better.
_SMALL = {"decoder.width": "8", "decoder.mlp_dim": "256"}
EXAMPLES = (
    ("", "the demo: paints 160 skin lesions, trains a small QTSeg, writes a report"),
    (
        "data=DIR",
        "5-fold cross-validation; DIR has images/ and masks/, or train/ and test/ of those, or is a CSV",
    ),
    ("data=DIR data.preset=isic2016 recipe=isic", "a public data set as it is handed out, trained as published"),
    ("data=DIR backbone=biformer_tiny decoder=unet", "any backbone, any decoder"),
    ("data=DIR backbone=dinat_mini +attention=bi_level_routing", "another token mixer; a gate goes to the decoder"),
    ("data=DIR data.resize=tiles data.img_size=256 training.draws=10", "large images in tiles at full resolution"),
    ("-m data=DIR decoder=qtseg,unet,self_guided", "compare networks"),
    ("action=evaluate checkpoint=RUN data=DIR", "all folds as one ensemble on other images"),
    ("action=predict checkpoint=RUN input=DIR out=RESULTS", "masks as PNG at the images' size, outlines as GeoJSON"),
    ("action=export checkpoint=RUN/fold_00 out=DIR", "ONNX, checked against the network"),
)


def run(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Do what ``action`` says; imports come late so that a mistyped option is answered at once."""
    match cfg.action:
        case "train" if cfg.data.kind == "shapes2d":
            from tasks.qtseg import demo_run as demo

            return demo.run(cfg, out)
        case "train":
            from tasks.qtseg import train

            return train.run(cfg, out)
        case "evaluate":
            from tasks.qtseg import evaluate

            return evaluate.run(cfg, out)
        case "predict":
            from tasks.qtseg import predict

            predict.run(cfg, out)
        case "export":
            from tasks.qtseg import export

            export.run(cfg, out)
        case other:
            raise unknown_name("action", str(other), ACTIONS)
    return None


def adjust(overrides: list[str]) -> list[str]:
    """``data=DIR`` becomes ``data.path=DIR``; without data it is the demo, with a recipe and network of its own."""
    overrides = data_as_path(overrides, DATA)
    keys = {override.lstrip("+").split("=")[0] for override in overrides}
    if not {"data", "data.path", "action"} & keys:
        overrides = [*overrides, "data=shapes2d"]
    if "data=shapes2d" not in overrides:
        return overrides
    if "recipe" not in keys:
        overrides = [*overrides, "recipe=demo"]
    if not {"decoder", "backbone"} & keys:
        overrides += [f"{key}={value}" for key, value in _SMALL.items() if key not in keys]
    return overrides


TASK = Task(
    name="qtseg",
    run=run,
    groups=("decoder", "backbone", "attention", "recipe", "data", "trainer", "kernels"),
    examples=EXAMPLES,
    adjust=adjust,
    choices={"data": DATA},
    help_files=("recipe/scratch.yaml", "data/segmentation2d.yaml", "kernels/auto.yaml"),
)

if __name__ == "__main__":
    sys.exit(main(TASK))

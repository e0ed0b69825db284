"""``python -m tasks.meningioma``: train, evaluate and predict on volumes. See ``--help``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.errors import unknown_name
from tasks.common.cli import Task, data_as_path, main

if TYPE_CHECKING:
    from omegaconf import DictConfig

DATA = ("volumes", "heads")
EXAMPLES = (
    ("", "the demo: makes 24 heads, trains a small AGUNet, writes a report"),
    ("data=DIR", "5-fold cross-validation; DIR is an nnU-Net folder, a plain folder of cases, or a CSV"),
    ("data=DIR network=daunet training.loss=dice_ce", "another network, another loss"),
    ("data=DIR network=unet3d +attention=polarized_parallel", "a gate on every skip connection"),
    ("data=DIR data.preparation.recipe=sliding network=dynunet", "patches at native resolution, not whole volumes"),
    ("-m data=DIR network=agunet,daunet,unet", "compare networks"),
    ("action=evaluate checkpoint=RUN data=DIR", "all folds as one ensemble on other cases"),
    ("action=predict checkpoint=RUN input=scan.nii.gz out=DIR", "mask, probabilities and volume in ml"),
)


def run(cfg: DictConfig, out: Path) -> dict[str, Any] | None:
    """Do what ``action`` says; imports come late so that a mistyped option is answered at once."""
    match cfg.action:
        case "train" if cfg.data.kind == "heads":
            from tasks.meningioma import demo_run as demo

            return demo.run(cfg, out)
        case "train":
            from tasks.meningioma import train

            return train.run(cfg, out)
        case "evaluate":
            from tasks.meningioma import evaluate

            return evaluate.run(cfg, out)
        case "predict":
            from tasks.meningioma import predict

            predict.run(cfg, out)
        case other:
            raise unknown_name("action", str(other), ["train", "evaluate", "predict"])
    return None


def adjust(overrides: list[str]) -> list[str]:
    """``data=DIR`` becomes ``data.path=DIR``; training without data is the demo.

    ``backbone=`` is let through, to be answered by a sentence: those of the registry are for images of two axes.
    """
    overrides = [f"+{o}" if o.startswith("backbone=") else o for o in overrides]
    overrides = data_as_path(overrides, DATA)
    keys = {override.lstrip("+").split("=")[0] for override in overrides}
    if not {"data", "data.path", "action"} & keys:
        overrides = [*overrides, "data=heads"]
    return overrides


TASK = Task(
    name="meningioma",
    run=run,
    groups=("network", "attention", "data", "trainer", "kernels"),
    examples=EXAMPLES,
    adjust=adjust,
    choices={"data": DATA},
    help_files=("data/volumes.yaml", "kernels/auto.yaml"),
)

if __name__ == "__main__":
    sys.exit(main(TASK))

"""``action=export``: trained networks as ONNX files, each compared with its network before it is kept."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from kernels.errors import InputError
from tasks.common.checkpoints import find_checkpoints
from tasks.common.files import write_json
from tasks.qtseg.model import load
from tasks.qtseg.networks.export import export_onnx

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> list[Path]:
    """Write ``NAME.onnx`` for each network of ``checkpoint=`` and ``model.json``, which says what goes in and out.

    The file takes prepared images (B, C, h, w) of the network's size (``data.img_size``, or that of a tile).

    Raises:
        InputError: no checkpoint, an export that is not installed, or a network that cannot be written.
    """
    segmenter = load(cfg)
    description = segmenter.description
    size = description.network["size"]
    if size is None:
        raise InputError(
            "a network trained with data.resize=native has no size of its own to be written for; train with fit, "
            "squash or tiles."
        )
    files = find_checkpoints(Path(cfg.checkpoint))
    names = ["model"] if len(files) == 1 else [file.parent.name for file in files]
    if cfg.dry_run:
        log.info("would write %s", ", ".join(f"{name}.onnx" for name in names))
        return []
    written = []
    for name, model in zip(names, segmenter.models, strict=True):
        path = out / f"{name}.onnx"
        off = export_onnx(model, path, description.network["in_channels"], size, bool(cfg.export.softmax))
        log.info("%s: differs from the network by %.1e at most", path, off)
        written.append(path)
    output = "probabilities" if cfg.export.softmax else "logits"
    about = {**asdict(description), "input": ["batch", description.network["in_channels"], *size], "output": output}
    write_json(out / "model.json", about)
    return written

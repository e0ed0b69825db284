"""A trained image classifier on disk, and back.

The file holds the backbone's own state dict, so that ``backbones.create_encoder(NAME, checkpoint=FILE)`` and
``backbone.checkpoint=FILE`` of any task take it as pretrained weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.classification.loading import Preprocessing
from tasks.classification.model import build_network
from tasks.common.checkpoints import find_checkpoints, read_model, write_model
from tasks.common.weighted_metrics import Kind

_TASK = "classification"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself; fulfils :class:`tasks.common.results.Classified`.

    Attributes:
        backbone: ``name`` and ``params``.
        attention: ``name`` and parameters, or None.
        classes: names in the order of the logits.
        preprocessing: of every image.
        training: fold, seed, epoch and hashes of the cases, for the record.
    """

    backbone: dict[str, Any]
    attention: dict[str, Any] | None
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return "binary" if len(self.classes) == 2 else "multiclass"

    @property
    def title(self) -> str:
        """Backbone and attention in a few words."""
        attention = f" + {self.attention['name']}" if self.attention else ""
        return f"{self.backbone['name']}{attention}"

    def build(self) -> nn.Module:
        """The network, untrained."""
        known = {key: self.backbone[key] for key in ("name", "params")}
        return build_network(known, self.attention, len(self.classes), self.preprocessing.img_size)


@dataclass
class ImageClassifier:
    """One network, or those of several folds whose probabilities are averaged."""

    models: list[nn.Module]
    description: Description

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the probabilities."""
        return list(self.description.classes)

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def to(self, device: torch.device | str) -> ImageClassifier:
        """Move all models."""
        for model in self.models:
            model.to(device)
        return self

    @torch.inference_mode()
    def predict(self, images: Tensor) -> Tensor:
        """Probabilities (M, B, C) of each model for transformed images (B, 3, S, S), in float32 on the CPU."""
        images = images.to(self.device)
        return torch.stack([model.eval()(images).float().softmax(1).cpu() for model in self.models])


def save_checkpoint(path: Path, model: nn.Module, description: Description) -> None:
    """Write ``model`` with its description, atomically."""
    write_model(path, model.state_dict(), _TASK, asdict(description))


def load_checkpoint(path: Path) -> tuple[nn.Module, Description]:
    """Read one ``model.safetensors``.

    Raises:
        InputError: the file is missing, damaged, not an image classifier of ours, or its backbone is not known here.
    """
    state, fields = read_model(path, _TASK)
    stored: dict[str, Any] = fields.pop("preprocessing")
    given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
    classes: Sequence[str] = fields.pop("classes")
    description = Description(classes=tuple(classes), preprocessing=Preprocessing(**given), **fields)
    model = description.build()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"checkpoint {path} does not fit {description.title} as it is built here.") from error
    return model.eval(), description


def load_classifier(path: Path) -> ImageClassifier:
    """The classifier meant by ``path``; the models of several folds form an ensemble.

    Raises:
        InputError: nothing there, unreadable, or folds that do not belong together.
    """
    loaded = [load_checkpoint(file) for file in find_checkpoints(Path(path))]
    first = loaded[0][1]
    for _, other in loaded[1:]:
        if (other.classes, other.preprocessing) != (first.classes, first.preprocessing):
            raise InputError(f"checkpoint={path} mixes models of different classes or image sizes; name one fold.")
    return ImageClassifier([model for model, _ in loaded], first)

"""A trained slide classifier on disk, and back: safetensors with a JSON description in their header."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.pooling import PooledBags
from kernels.errors import InputError
from tasks.common.checkpoints import find_checkpoints, read_model, write_model
from tasks.wsi_mil.model import SlideModel
from tasks.wsi_mil.targets import Target

_TASK = "wsi_mil"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    Attributes:
        dim: feature size.
        attention: pooler name and parameters.
        target: kind and classes.
        standardise: whether the model standardises its features.
        encoder: what made the features (name, weights, fingerprint ...), as written in the feature files; may be empty.
        tiles: how tiles were cut (mpp, tile, overlap ...), as written in the feature files; may be empty.
        training: fold, seed and epoch, for the record.
    """

    dim: int
    attention: dict[str, Any]
    target: Target
    standardise: bool = False
    encoder: dict[str, Any] = field(default_factory=dict)
    tiles: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def build(self) -> SlideModel:
        """The model, untrained."""
        return SlideModel(self.dim, self.target.num_outputs, self.attention, self.standardise)


@dataclass(frozen=True)
class SlidePrediction:
    """What a classifier says of one bag of N tiles.

    Attributes:
        probabilities: (C,) mean over the models.
        model_probabilities: (M, C), one row per model.
        attention: (branches, N) weights, each row summing to one, mean over the models.
        mean_attention: (N,) one map: the mean over branches, or the row of the predicted class.
    """

    probabilities: Tensor
    model_probabilities: Tensor
    attention: Tensor
    mean_attention: Tensor


@dataclass
class SlideClassifier:
    """One model, or the models of several folds whose probabilities are averaged."""

    models: list[SlideModel]
    description: Description

    @property
    def classes(self) -> list[str]:
        """Class names in the order of the probabilities."""
        return list(self.description.target.classes)

    @property
    def target(self) -> Target:
        return self.description.target

    @property
    def encoder(self) -> dict[str, Any]:
        return self.description.encoder

    @property
    def tiles(self) -> dict[str, Any]:
        return self.description.tiles

    def to(self, device: torch.device | str) -> SlideClassifier:
        """Move all models."""
        for model in self.models:
            model.to(device)
        return self

    @torch.inference_mode()
    def predict(self, features: Tensor) -> SlidePrediction:
        """Classify one bag ``features (N, D)``.

        Raises:
            InputError: no tiles, or another feature size than the model was trained on.
        """
        check_features(features.shape, self.description.dim)
        device = next(self.models[0].parameters()).device
        features = features.to(device)
        boundaries = torch.tensor([0, len(features)], device=device)
        per_model, maps = [], []
        for model in self.models:
            model.eval()
            bags = model(features, boundaries)
            per_model.append(self.target.probabilities(bags.logits.float())[0].cpu())
            maps.append(attention_weights(bags, boundaries).cpu())
        model_probabilities = torch.stack(per_model)
        probabilities = model_probabilities.mean(0)
        weights = torch.stack(maps).mean(0)
        rows = self.models[0].pooler.attention_rows
        return SlidePrediction(probabilities, model_probabilities, weights, self._one_map(weights, probabilities, rows))

    def _one_map(self, weights: Tensor, probabilities: Tensor, rows: str) -> Tensor:
        if rows == "branch" or len(weights) == 1:
            return weights.mean(0)
        row = int(probabilities.argmax())
        # An ordinal model has one row per threshold: the last one passed explains the predicted grade.
        return weights[max(row - 1, 0) if self.target.kind == "ordinal" else row]


def check_features(shape: Sequence[int], dim: int) -> None:
    """Raise InputError unless ``shape`` is (N, dim) with N > 0."""
    if len(shape) != 2 or shape[0] == 0:
        raise InputError(f"the bag holds no tiles (shape {tuple(shape)}); prepare the slide again or leave it out.")
    if shape[1] != dim:
        raise InputError(
            f"the features have {shape[1]} values per tile and the model was trained on {dim}; "
            "use features of the encoder the model was trained with."
        )


def attention_weights(bags: PooledBags, cu_seqlens: Tensor) -> Tensor:
    """Attention (branches, T) as weights that sum to one over each bag."""
    from kernels.segment import segment_softmax

    return segment_softmax(bags.attention.float(), cu_seqlens)


def save_checkpoint(path: Path, model: SlideModel, description: Description) -> None:
    """Write ``model`` with its description, atomically."""
    write_model(path, model.state_dict(), _TASK, {**asdict(description), "target": asdict(description.target)})


def load_checkpoint(path: Path) -> tuple[SlideModel, Description]:
    """Read one ``model.safetensors``.

    Raises:
        InputError: the file is missing, damaged, or not a slide classifier of ours.
    """
    state, fields = read_model(path, _TASK)
    target = fields.pop("target")
    weights = target["weights"]
    description = Description(
        target=Target(target["kind"], tuple(target["classes"]), None if weights is None else tuple(weights)), **fields
    )
    model = description.build()
    model.load_state_dict(state)
    return model.eval(), description


def load_classifier(path: Path) -> SlideClassifier:
    """The classifier meant by ``path``; the models of several folds form an ensemble.

    Raises:
        InputError: nothing there, unreadable, or folds that do not belong together.
    """
    loaded = [load_checkpoint(file) for file in find_checkpoints(Path(path))]
    first = loaded[0][1]
    for _, description in loaded[1:]:
        if (description.dim, description.target.kind, description.target.classes) != (
            first.dim,
            first.target.kind,
            first.target.classes,
        ):
            raise InputError(f"checkpoint={path} mixes models of different classes or feature sizes; name one fold.")
    return SlideClassifier([model for model, _ in loaded], first)

"""A trained slide classifier on disk, and back: safetensors with a JSON description in their header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attention.pooling import PooledBags
from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.files import atomic_path
from tasks.wsi_mil.model import SlideModel
from tasks.wsi_mil.targets import Target

FILE_NAME = "model.safetensors"
_HEADER = "fovea_wsi_mil"


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
    header = {_HEADER: json.dumps({**asdict(description), "target": asdict(description.target)}, sort_keys=True)}
    with atomic_path(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary, metadata=header)


def load_checkpoint(path: Path) -> tuple[SlideModel, Description]:
    """Read one ``model.safetensors``.

    Raises:
        InputError: the file is missing, damaged, or not a slide classifier of ours.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give a run folder, a fold folder or a {FILE_NAME}.")
    try:
        with safe_open(path, framework="pt") as handle:
            header = (handle.metadata() or {}).get(_HEADER)
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); it may be cut short: copy it again.") from error
    if header is None:
        raise InputError(f"checkpoint {path} was not written by tasks.wsi_mil; give the {FILE_NAME} of a training run.")
    fields = json.loads(header)
    target = fields.pop("target")
    weights = target["weights"]
    description = Description(
        target=Target(target["kind"], tuple(target["classes"]), None if weights is None else tuple(weights)), **fields
    )
    model = description.build()
    model.load_state_dict(state)
    return model.eval(), description


def fold_name(fold: Fold) -> str:
    """Folder of a fold inside its run; :func:`find_checkpoints` looks for these."""
    return f"fold_{fold.index:02d}"


def hashed(case_id: str) -> str:
    """A short hash of an id: tells later whether a case was trained on without carrying the id along."""
    return hashlib.sha256(case_id.encode()).hexdigest()[:16]


def find_checkpoints(path: Path) -> list[Path]:
    """The model files meant by a path: the file itself, a fold's, or those of all folds of a run."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"checkpoint={path} does not exist; give a run folder, a fold folder or a {FILE_NAME}.")
    if path.is_file():
        return [path]
    found = [path / FILE_NAME] if (path / FILE_NAME).is_file() else sorted(path.glob(f"fold_*/{FILE_NAME}"))
    if not found:
        raise InputError(
            f"checkpoint={path} holds no {FILE_NAME} and no finished fold; train first, or give another folder."
        )
    return found


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

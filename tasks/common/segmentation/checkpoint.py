"""A trained segmentation network on disk, and the networks of several folds as one segmenter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.common.checkpoints import find_checkpoints, read_model, write_model
from tasks.common.segmentation.inference import Inference, predict_probabilities
from tasks.common.segmentation.layout import lay_out


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself, in JSON's types.

    Attributes:
        network: what the task builds the network from: its name and parameters, backbone and attention among them.
        classes: names, the background first.
        preparation: of every image, as the task stores it.
        inference: fields of :class:`Inference`.
        cut: how masks were made of probabilities, by the names of the section ``inference``.
        cutoff: probability from which on a place belongs to a structure, chosen on validation cases; None: the
            likeliest class.
        training: fold, seed, epoch and hashes of the cases, for the record.
    """

    network: dict[str, Any]
    classes: tuple[str, ...]
    preparation: dict[str, Any]
    inference: dict[str, Any] = field(default_factory=dict)
    cut: dict[str, Any] = field(default_factory=dict)
    cutoff: float | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Network, backbone and attention in a few words."""
        parts = [self.network.get("name"), self.network.get("backbone"), self.network.get("attention")]
        names = [part["name"] if isinstance(part, dict) else part for part in parts if part]
        return " + ".join(map(str, names))

    def how(self) -> Inference:
        """The stored inference."""
        return _inference(self.inference)


def _inference(fields: Mapping[str, Any]) -> Inference:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Inference(**given)


Build = Callable[[Description], nn.Module]


@dataclass
class Segmenter:
    """One network, or those of several folds whose probabilities are averaged.

    Attributes:
        cutoffs: of each network; the segmenter's own is their mean.
        trained_on: hashes of the cases that any of the networks has seen.
    """

    models: list[nn.Module]
    description: Description
    cutoffs: list[float | None]
    trained_on: set[str]

    @property
    def cutoff(self) -> float | None:
        known = [cutoff for cutoff in self.cutoffs if cutoff is not None]
        return sum(known) / len(known) if known else None

    @property
    def device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def to(self, device: torch.device | str) -> Segmenter:
        """Move all networks."""
        for model in self.models:
            lay_out(model.to(device))
        return self

    def probabilities(
        self, image: Tensor, how: Inference | None = None, on_step: Callable[[], None] | None = None
    ) -> Tensor:
        """Probabilities (K, *spatial) on the CPU of a prepared image (C, *spatial)."""
        return predict_probabilities(self.models, image, how or self.description.how(), self.device, on_step)


def fill_inference(settings: DictConfig, values: Mapping[str, Any]) -> None:
    """Give what is null in a task's section ``inference`` its value: a default in training, later that of the training.

    Without this, a checkpoint would be used in another way than the one its figures were measured in.
    """
    for name, value in values.items():
        if name in settings and settings[name] is None:
            settings[name] = value


def inference_fields(settings: DictConfig, patch_size: Sequence[int] | None) -> dict[str, Any]:
    """Fields of :class:`Inference` for a task's section ``inference``, as a checkpoint keeps them.

    Raises:
        InputError: a setting cannot be used.
    """
    fields: dict[str, Any] = {name: settings[name] for name in ("overlap", "batch_size", "flips", "amp")}
    fields["flip_axes"] = _flip_axes(settings)
    fields["patch_size"] = None if patch_size is None else list(patch_size)
    _inference(fields)
    return fields


def _flip_axes(settings: DictConfig) -> list[int] | None:
    axes = settings.flip_axes
    if axes is None:
        return None
    if not isinstance(axes, ListConfig) or not all(isinstance(axis, int) for axis in axes):
        raise InputError(f"inference.flip_axes={axes} must be a list of numbers, such as [0].")
    return list(axes)


def check_cutoff(cutoff: object) -> None:
    """Raise InputError for a cut-off that cannot be."""
    if cutoff not in ("search", "argmax") and not (isinstance(cutoff, int | float) and 0 < cutoff < 1):
        raise InputError(f"inference.cutoff={cutoff} must be search, argmax, or a probability between 0 and 1.")


def inference_of(segmenter: Segmenter, settings: DictConfig) -> Inference:
    """How the segmenter sees images, with the settings of a task's section ``inference``."""
    stored = segmenter.description.how()
    axes = _flip_axes(settings)
    overlap, batch_size, amp = settings.overlap, settings.batch_size, settings.amp
    return Inference(stored.patch_size, overlap, batch_size, settings.flips, None if axes is None else tuple(axes), amp)


def save_segmenter(path: Path, task: str, model: nn.Module, description: Description) -> None:
    """Write ``model`` with its description, atomically."""
    write_model(path, model.state_dict(), task, asdict(description))


def segmenter_of(cfg: DictConfig, task: str, build: Build) -> Segmenter:
    """The segmenter of ``checkpoint=``; what is null in ``inference`` becomes what it was trained with.

    Raises:
        InputError: no checkpoint is given, or it cannot be used.
    """
    if cfg.checkpoint is None:
        raise InputError(
            f"action={cfg.action} needs checkpoint=RUN, a run folder, a fold folder or a model.safetensors."
        )
    segmenter = load_segmenter(cfg.checkpoint, task, build)
    fill_inference(cfg.inference, segmenter.description.inference | segmenter.description.cut)
    return segmenter


def load_segmenter(path: Path, task: str, build: Build) -> Segmenter:
    """The segmenter meant by ``path``: a file, a fold's folder, or a run, whose folds form an ensemble.

    Raises:
        InputError: nothing there, unreadable, of another task, or folds that do not belong together.
    """
    loaded = [_load_one(file, task, build) for file in find_checkpoints(Path(path))]
    first = loaded[0][1]
    for _, other in loaded[1:]:
        if (other.classes, other.preparation) != (first.classes, first.preparation):
            raise InputError(f"checkpoint={path} mixes networks of different classes or preparation; name one fold.")
    seen = {case for _, description in loaded for case in description.training.get("cases", [])}
    return Segmenter([model for model, _ in loaded], first, [d.cutoff for _, d in loaded], seen)


def _load_one(path: Path, task: str, build: Build) -> tuple[nn.Module, Description]:
    state, fields = read_model(path, task)
    classes: Sequence[str] = fields.pop("classes")
    description = Description(classes=tuple(classes), **fields)
    model = build(description)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(f"checkpoint {path} does not fit {description.title} as it is built here.") from error
    return model.eval(), description

"""From a prepared image to probabilities: whole or by overlapping windows, with flips, and averaged over networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from kernels.errors import InputError

FLIPS = ("none", "axes", "all")
TOGETHER = 2**20
"""Voxels of the windows that are looked at together: 8 of 48 x 48 x 48, 4 of 64 x 64 x 64, one of 128 x 128 x 128."""
MOST_WINDOWS = 8


@dataclass(frozen=True)
class Inference:
    """How probabilities are made.

    Attributes:
        patch_size: of the windows, one length for each axis; None: the whole image at once.
        overlap: share that neighbouring windows have in common.
        batch_size: windows at once; None: as many small ones as have the voxels of a large one.
        flips: test-time flips: ``"none"``, ``"axes"``: each of ``flip_axes`` alone, ``"all"``: every combination.
        flip_axes: of the image, counted from 0 without batch and channels; None: all.
        amp: run the networks in bfloat16 on a GPU.
    """

    patch_size: tuple[int, ...] | None = None
    overlap: float = 0.5
    batch_size: int | None = None
    flips: str = "none"
    flip_axes: tuple[int, ...] | None = None
    amp: bool = False

    def __post_init__(self) -> None:
        if self.flips not in FLIPS:
            raise InputError(f"inference.flips={self.flips} is not known; use {', '.join(FLIPS)}.")
        if not 0 <= self.overlap < 1:
            raise InputError(f"inference.overlap={self.overlap} must be 0 or more and less than 1.")
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"inference.batch_size={self.batch_size} must be 1 or more.")
        if self.patch_size is not None and min(self.patch_size) < 1:
            raise InputError(f"inference.patch_size={list(self.patch_size)} must be lengths of 1 or more.")

    def windows_at_once(self) -> int:
        """How many windows go through the network together."""
        if self.batch_size is not None or self.patch_size is None:
            return self.batch_size or 1
        return min(MOST_WINDOWS, max(1, TOGETHER // math.prod(self.patch_size)))

    def flipped_axes(self, dims: int) -> list[tuple[int, ...]]:
        """The sets of axes to flip, the empty one first.

        Raises:
            InputError: an axis the image has not.
        """
        axes = tuple(range(dims)) if self.flip_axes is None else self.flip_axes
        if any(not 0 <= axis < dims for axis in axes):
            raise InputError(f"inference.flip_axes={list(axes)}: the image has axes 0 to {dims - 1}.")
        if self.flips == "none":
            return [()]
        if self.flips == "axes":
            return [(), *((axis,) for axis in axes)]
        return [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]


@torch.inference_mode()
def predict_probabilities(
    models: Sequence[nn.Module],
    image: Tensor,
    how: Inference,
    device: torch.device | str = "cpu",
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Probabilities (K, *spatial) in float32 on the CPU: the mean over the networks and the flips.

    Args:
        models: in evaluation mode, on ``device``.
        image: (C, *spatial), prepared.
        on_step: called after each network and flip, for a progress bar.
    """
    device = torch.device(device)
    dims = image.ndim - 1
    flips = how.flipped_axes(dims)
    total: Tensor | None = None
    for model in models:
        for axes in flips:
            places = [axis + 2 for axis in axes]
            turned = image[None].flip(places) if places else image[None]
            # Flips of one network differ by their input alone, so that memory is that of one.
            out = _run(model, turned, how, device)
            out = out.flip(places) if places else out
            total = out if total is None else total.add_(out)
            if on_step is not None:
                on_step()
    assert total is not None
    return (total / (len(models) * len(flips)))[0]


def _run(model: nn.Module, image: Tensor, how: Inference, device: torch.device) -> Tensor:
    """Probabilities (1, K, *spatial) on the CPU."""

    def probabilities(window: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=how.amp and device.type == "cuda"):
            logits = model(window.to(device))
        return logits.float().softmax(1)

    if how.patch_size is None:
        return probabilities(image).cpu()
    from monai.inferers.utils import sliding_window_inference

    if len(how.patch_size) != image.ndim - 2:
        raise InputError(f"inference.patch_size={list(how.patch_size)} needs {image.ndim - 2} lengths for this image.")
    out = sliding_window_inference(
        image,
        how.patch_size,
        how.windows_at_once(),
        probabilities,
        overlap=how.overlap,
        mode="gaussian",
        sw_device=device,
        device=torch.device("cpu"),
    )
    assert isinstance(out, Tensor)
    return out


def drop_small(mask: NDArray[np.integer], smallest: float, largest_only: bool = False) -> NDArray[np.integer]:
    """The mask without face-connected components, of any class, of fewer voxels than ``smallest``.

    Args:
        mask: classes of any shape, 0 is the background.
        largest_only: of each class, keep its largest component alone.
    """
    if smallest <= 1 and not largest_only:
        return mask
    kept = mask.copy()
    for value in np.unique(mask[mask != 0]):
        components, count = ndimage.label(mask == value)
        sizes = np.bincount(components.ravel(), minlength=count + 1)
        keep = sizes >= smallest
        if largest_only and count:
            keep &= np.arange(count + 1) == 1 + int(sizes[1:].argmax())
        keep[0] = True
        kept[~keep[components]] = 0
    return kept


def classes_of(probabilities: NDArray[np.floating], cutoff: float | None) -> NDArray[np.uint8]:
    """Classes (*spatial) of probabilities (K, *spatial).

    Args:
        cutoff: a place belongs to the likeliest structure if any structure is at least this likely; None: to the
            likeliest class, the background among them.
    """
    if cutoff is None:
        return probabilities.argmax(0).astype(np.uint8)
    structures = probabilities[1:]
    found = structures.max(0) >= cutoff if len(structures) > 1 else structures[0] >= cutoff
    best = structures.argmax(0) if len(structures) > 1 else 0
    return np.where(found, best + 1, 0).astype(np.uint8)


def forward_of(how: Inference) -> Callable[[nn.Module, Tensor], Tensor] | None:
    """Logits of whole images (B, C, *spatial) by windows, for validation; None where the network sees them whole."""
    return None if how.patch_size is None else lambda model, image: sliding_logits(model, image, how)


def sliding_logits(model: nn.Module, image: Tensor, how: Inference) -> Tensor:
    """Logits (B, K, *spatial) of whole images (B, C, *spatial) from windows, on the image's device."""
    from monai.inferers.utils import sliding_window_inference

    assert how.patch_size is not None
    out = sliding_window_inference(
        image, how.patch_size, how.windows_at_once(), model, overlap=how.overlap, mode="gaussian"
    )
    assert isinstance(out, Tensor)
    return out

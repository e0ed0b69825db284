"""Whether each mixer learns: a tiny host is trained on crops of real images, once per mixer and seed.

    python -m backbones.trial [MIXER ...] [--images FOLDER] [--seeds 3] [--steps 200] [--json FILE]

The images are scikit-image's bundled ones (an immunohistochemical section, a retina, and photographs of grass, gravel
and brick), or those of FOLDER, one subfolder per class. Crops are grey and standardised, so that neither colour nor
brightness tells classes apart; training crops come from the left of each image, test crops from the right. This says
that a mixer trains, not how good it is: for that see ``python -m tasks.classification``.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import attention
import backbones.ours  # noqa: F401  (registers the host with timm)
from attention.about import About
from attention.mixer import Mixer
from kernels.bench import write_json
from kernels.errors import InputError, unknown_name

BUNDLED = ("immunohistochemistry", "retina", "grass", "gravel", "brick")
CROP = 48
LEAST = 0.6
"""Accuracy every mixer must reach; chance is 0.2 on the bundled images."""
_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
# 97.5 % quantiles of Student's t by degrees of freedom.
_STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class NoMixing(Mixer):
    """Gives its input back: what the host learns by its convolutions alone."""

    kind = "mixer"
    name = "none"
    about = About("no mixer, for comparison, 2026", "O(1)")
    grids = (1, 2, 3)

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__(dim, num_heads)

    def mix(self, x: Tensor, mask: Tensor | None, extras: dict[str, Tensor] | None) -> Tensor:
        return torch.zeros_like(x)


@dataclass
class Trial:
    """One mixer's results.

    Attributes:
        accuracies: on the test crops, one per seed.
        mean: of them; ``half_width`` is that of its 95 % interval over seeds (Student's t), None for one seed.
        seconds: of one training run.
    """

    mixer: str
    accuracies: list[float]
    mean: float
    half_width: float | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the ranking; the return value is 1 when a mixer stays below ``--least``."""
    parser = argparse.ArgumentParser(prog="python -m backbones.trial", description="Does each mixer learn?")
    parser.add_argument("mixer", nargs="*", help="which mixers (default: all), or package.module:Class")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="one subfolder of images per class")
    parser.add_argument("--seeds", type=int, default=3, help="runs per mixer (default: 3)")
    parser.add_argument("--steps", type=int, default=200, help="of 32 crops (default: 200)")
    parser.add_argument("--least", type=float, default=LEAST, help=f"accuracy to reach (default: {LEAST})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if chosen.seeds < 1 or chosen.steps < 1:
            raise InputError(f"--seeds {chosen.seeds} and --steps {chosen.steps} must be at least 1.")
        known = attention.available(kind="mixer")
        for name in chosen.mixer:
            if name not in known and ":" not in name:
                raise unknown_name("mixer", name, known)
            attention.class_of(name, "mixer")  # refuses paths that lead elsewhere before hours of training
        images = _bundled() if chosen.images is None else _from_folder(chosen.images)
        trials = _run(chosen, chosen.mixer or [f"{__name__}:NoMixing", *known], images)
    except InputError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(str(error), markup=False)
        return 1
    console.print(ranking(trials, chosen.least))
    return int(any(trial.mean < chosen.least for trial in trials if trial.mixer != NoMixing.name))


def ranking(trials: Sequence[Trial], least: float) -> Table:
    """The mixers from best to worst."""
    shown = Table(title=f"accuracy on unseen crops; at least {least:.2f} is asked for", title_justify="left")
    for column in ("mixer", "accuracy", "95 % interval", "worst seed", "seeds", "s per run", ""):
        shown.add_column(column, justify="left" if column in ("mixer", "") else "right")
    for trial in sorted(trials, key=lambda t: -t.mean):
        interval = ""
        if trial.half_width is not None:
            low, high = max(0.0, trial.mean - trial.half_width), min(1.0, trial.mean + trial.half_width)
            interval = f"{low:.3f} - {high:.3f}"
        cells = [f"{trial.mean:.3f}", interval, f"{min(trial.accuracies):.3f}", str(len(trial.accuracies))]
        shown.add_row(trial.mixer, *cells, f"{trial.seconds:.1f}", "" if trial.mean >= least else "below")
    return shown


def _run(chosen: argparse.Namespace, names: Sequence[str], images: dict[str, list[Tensor]]) -> list[Trial]:
    trials: list[Trial] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(names) * chosen.seeds)
        for name in names:
            accuracies, start = [], time.perf_counter()
            shown = NoMixing.name if name.endswith(":NoMixing") else name
            for seed in range(chosen.seeds):
                bar.update(task, description=f"{shown}, seed {seed}")
                accuracies.append(train(name, images, seed, chosen.steps))
                bar.advance(task)
            seconds = (time.perf_counter() - start) / chosen.seeds
            trials.append(summary(shown, accuracies, seconds))
            if chosen.json is not None:
                write_json(chosen.json, [asdict(trial) for trial in trials])
    return trials


def summary(mixer: str, accuracies: list[float], seconds: float) -> Trial:
    """Mean and interval over seeds."""
    count, mean = len(accuracies), sum(accuracies) / len(accuracies)
    half_width = None
    if count > 1:
        spread = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / (count - 1))
        half_width = _STUDENT.get(count - 1, 1.96) * spread / math.sqrt(count)
    return Trial(mixer, accuracies, mean, half_width, seconds)


def train(mixer: str, images: dict[str, list[Tensor]], seed: int, steps: int) -> float:
    """Train the tiny host with ``mixer`` for ``steps`` batches of 32 crops; return its accuracy on the test crops."""
    torch.manual_seed(seed)
    host = timm.create_model(
        "metaformer_tiny",
        attention=mixer,
        depths=(1, 1, 1, 1),
        dims=(32, 64, 64, 64),
        in_chans=1,
        num_classes=len(images),
        img_size=CROP,
        drop_path_rate=0.0,
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(host.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps, pct_start=0.1)
    host.train()
    for _ in range(steps):
        crops, labels = _batch(images, 32, generator)
        loss = F.cross_entropy(host(crops), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    host.eval()
    right = total = 0
    with torch.inference_mode():
        for label, crops in enumerate(_test_crops(found) for found in images.values()):
            for part in crops.split(64):
                right += int((host(part).argmax(1) == label).sum())
                total += len(part)
    return right / total


# -------------------------------------------------------------------------------------------------------------- crops


def _batch(images: dict[str, list[Tensor]], size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Crops (size, 1, CROP, CROP) from the left two thirds of the images, turned and mirrored, and their classes."""
    classes = list(images.values())
    labels = torch.randint(len(classes), (size,), generator=generator)
    crops = []
    for label in labels.tolist():
        image = classes[label][int(torch.randint(len(classes[label]), (), generator=generator))]
        room = image.shape[0] - CROP, image.shape[1] * 2 // 3 - CROP
        top, left = (int(torch.randint(n + 1, (), generator=generator)) for n in room)
        crop = image[top : top + CROP, left : left + CROP]
        turns, mirrored = torch.randint(4, (), generator=generator), torch.randint(2, (), generator=generator)
        crop = crop.rot90(int(turns))
        crops.append(crop.flip(1) if mirrored else crop)
    return _standardised(torch.stack(crops)), labels


def _test_crops(images: Sequence[Tensor]) -> Tensor:
    """Crops (N, 1, CROP, CROP) that tile the right third of each image; at most 200 of them, evenly chosen."""
    crops = torch.cat(
        [
            image[:, image.shape[1] * 2 // 3 :].unfold(0, CROP, CROP // 2).unfold(1, CROP, CROP // 2).flatten(0, 1)
            for image in images
        ]
    )
    return _standardised(crops[:: math.ceil(len(crops) / 200)])


def _standardised(crops: Tensor) -> Tensor:
    mean, spread = crops.mean((1, 2), keepdim=True), crops.std((1, 2), keepdim=True)
    return ((crops - mean) / spread.clamp_min(1e-3))[:, None]


def _bundled() -> dict[str, list[Tensor]]:
    try:
        import skimage.data
    except ImportError as error:
        raise InputError(
            "the bundled images come with scikit-image: pip install scikit-image, or give --images FOLDER."
        ) from error
    found = {name: [_grey(np.asarray(getattr(skimage.data, name)()))] for name in BUNDLED}
    # The retina fills a disc: its corners are empty.
    side = found["retina"][0].shape[0]
    found["retina"] = [found["retina"][0][side // 5 : -side // 5, side // 5 : -side // 5]]
    return found


def _from_folder(folder: Path) -> dict[str, list[Tensor]]:
    from PIL import Image, UnidentifiedImageError

    found: dict[str, list[Tensor]] = {}
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        for path in sorted(p for p in place.iterdir() if p.suffix.lower() in _SUFFIXES):
            try:
                image = _grey(np.asarray(Image.open(path).convert("RGB")))
            except (OSError, UnidentifiedImageError) as error:
                raise InputError(f"{path} cannot be read as an image ({error}).") from error
            if image.shape[0] < CROP or image.shape[1] < 3 * CROP:
                raise InputError(f"{path} is {tuple(image.shape)}; at least {CROP} x {3 * CROP} pixels are needed.")
            found.setdefault(place.name, []).append(image)
    if len(found) < 2:
        raise InputError(f"--images {folder}: two or more subfolders with images are needed, one per class.")
    return found


def _grey(image: np.ndarray) -> Tensor:
    """(H, W), from 0 to 1."""
    values = image.astype(np.float32) / 255
    return torch.from_numpy(values if values.ndim == 2 else values[..., :3].mean(-1))


if __name__ == "__main__":
    raise SystemExit(main())

"""One fold: training, the cut-off where one is searched, and the test images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from kernels.errors import InputError
from tasks.common.checkpoints import FILE_NAME, fold_name, hashed
from tasks.common.crossval import Fold
from tasks.common.devices import device_for
from tasks.common.files import atomic_path, write_json
from tasks.common.progress import ProgressBars
from tasks.common.samplers import EpochSampler
from tasks.common.segmentation.batch import Batch
from tasks.common.segmentation.checkpoint import Description, Segmenter, load_segmenter, save_segmenter
from tasks.common.segmentation.cutoff import best_cutoff, cutoff_counts
from tasks.common.segmentation.fitting import fit_network
from tasks.common.segmentation.inference import forward_of
from tasks.common.segmentation.losses import IGNORE, DeepSupervision
from tasks.common.training import discard_resume_state, first_process
from tasks.qtseg.augmentation import Augmentation
from tasks.qtseg.data import ImageSet2D, Sample
from tasks.qtseg.loading import SegmentationDataset, Store, collate, make_loader, read_sample
from tasks.qtseg.model import TASK, build, is_pretrained
from tasks.qtseg.outcomes import Outcomes
from tasks.qtseg.scoring import Scoring
from tasks.qtseg.segment import Cut, how_to_infer, segment

log = logging.getLogger(__name__)
_CUTOFFS = tuple(round(0.05 * k, 2) for k in range(1, 20))


@dataclass(frozen=True)
class Study:
    """All that a run works on.

    Attributes:
        images: the set.
        store: of prepared images.
        augment: of training images.
        folds: who trains and who tests.
        description: what every checkpoint will say of itself.
        loss: what is minimised.
        scoring: how images are scored.
        notes: what a reader of the results should know of the set.
    """

    images: ImageSet2D
    store: Store
    augment: Augmentation
    folds: Sequence[Fold]
    description: Description
    loss: DeepSupervision
    scoring: Scoring
    notes: list[str]


def run_fold(study: Study, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars) -> None:
    """Train on one fold, keep the network, segment its test images; ``metrics.json`` comes last."""
    seed = int(cfg.seed) * 10_007 + fold.index
    torch.manual_seed(seed)
    if not (folder / FILE_NAME).exists():
        _train(study, fold, cfg, folder, bars, seed)
    with first_process() as writes:
        if writes:
            _test(study, fold, cfg, folder, bars)


def _train(study: Study, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars, seed: int) -> None:
    released = study.scoring.released
    # The published choice: every image that is not tested trains, and the tested ones choose the epoch.
    train, val = ([*fold.train, *fold.val], fold.test) if released else (fold.train, fold.val)
    network = build(study.description, weights=True)
    preprocessing = study.store.preprocessing
    drawn = study.images.select(train) * int(cfg.training.draws)
    sampler = EpochSampler(len(drawn), seed, None)
    together = _with_padding if released else _counted
    dataset = SegmentationDataset(drawn, study.store, study.augment)
    loader = make_loader(dataset, cfg.training.batch_size, sampler, cfg.data.workers, together)
    held = None
    if val:
        whole_batches = cfg.training.batch_size if preprocessing.whole else 1
        kept = SegmentationDataset(study.images.select(val), study.store)
        held = make_loader(kept, whole_batches, None, cfg.data.workers, together)
    fitted = fit_network(
        network,
        study.loss,
        (loader, held),
        cfg,
        folder,
        bars,
        seed,
        sampler,
        forward=forward_of(study.description.how()),
        freeze=_freezer(cfg) if is_pretrained(study.description) else None,
        size=preprocessing.size,
        channels=preprocessing.channels,
        size_option="data.img_size",
    )
    with first_process() as writes:
        if not writes:
            return
        cutoff = _search_cutoff(study, study.images.select(val), cfg, network, folder.name, bars)
        facts = {
            "fold": fold_name(fold),
            "seed": seed,
            "epoch": fitted.epoch,
            "protocol": cfg.protocol,
            "cases": [hashed(case) for case in (*train, *val)],
        }
        save_segmenter(folder / FILE_NAME, TASK, network, replace(study.description, cutoff=cutoff, training=facts))
        discard_resume_state(folder)


def _freezer(cfg: DictConfig) -> Callable[[nn.Module, int], None]:
    epochs = int(cfg.training.freeze_epochs)

    def freeze(network: nn.Module, epoch: int) -> None:
        if epochs:
            encoder: Any = network.encoder
            encoder.requires_grad_(epoch >= epochs)

    return freeze


def _counted(items: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> Batch:
    """A batch in which the padding and what lies outside the field of view do not count."""
    images, target, valid, position = collate(items)
    return Batch(images, torch.where(valid, target, IGNORE), position)


def _with_padding(items: Sequence[tuple[Tensor, Tensor, Tensor, int]]) -> Batch:
    """A batch in which everything counts, the padding as background."""
    images, target, _, position = collate(items)
    return Batch(images, target, position)


def _search_cutoff(
    study: Study, samples: Sequence[Sample], cfg: DictConfig, network: nn.Module, name: str, bars: ProgressBars
) -> float | None:
    """The cut-off that serves the validation images best; None where it is not asked for or cannot be chosen."""
    if cfg.inference.cutoff != "search":
        return None
    if not samples:
        log.warning("%s has no validation image to choose a cut-off on; the likeliest class is taken.", name)
        return None
    segmenter = Segmenter([network.eval()], study.description, [None], set()).to(device_for(cfg.inference.device))
    how, counts = how_to_infer(segmenter, cfg.inference), []
    with bars.add(f"{name}: cut-off", total=len(samples), unit="images", passing=True) as bar:
        for sample in samples:
            image, reference, fov = read_sample(sample, study.images.coding)
            found = segment(segmenter, study.store.preprocessing, image, how).probabilities()
            counts.append(cutoff_counts(found[1:].max(0).clip(0, 1), reference > 0, _CUTOFFS, region=fov))
            bar.advance(1)
    try:
        return best_cutoff(counts, _CUTOFFS).cutoff
    except InputError as error:
        log.warning("%s: %s The likeliest class is taken.", name, error)
        return None


def _test(study: Study, fold: Fold, cfg: DictConfig, folder: Path, bars: ProgressBars) -> None:
    """Segment the test images that are not done yet; with ``metrics.json`` the fold counts as finished."""
    segmenter = load_segmenter(folder / FILE_NAME, TASK, build).to(device_for(cfg.inference.device))
    preprocessing = study.store.preprocessing
    outcomes = Outcomes(folder, study.images, study.scoring, preprocessing, bool(cfg.inference.probabilities))
    cut, how = Cut.of(cfg.inference, segmenter.cutoff), how_to_infer(segmenter, cfg.inference)
    tested = study.images.select(fold.test)
    left = [sample for sample in tested if not outcomes.has(sample)]
    with bars.add(f"{fold_name(fold)}: test", total=len(left), unit="images", passing=True) as bar:
        for sample in left:
            image, reference, fov = read_sample(sample, study.images.coding)
            outcomes.add(sample, reference, fov, segment(segmenter, preprocessing, image, how), cut)
            bar.advance(1)
    table = outcomes.table(tested, fold)
    with atomic_path(folder / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False)
    names = study.scoring.metrics(study.images.classes)
    write_json(
        folder / "metrics.json",
        {
            "epoch": segmenter.description.training.get("epoch"),
            "protocol": str(cfg.protocol),
            "cutoff": cut.cutoff,
            "cases": len(table),
            **{name: float(table[name].mean()) for name in names},
        },
    )

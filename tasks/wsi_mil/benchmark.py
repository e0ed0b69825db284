"""``data=mil_benchmark``: the published 5 x 10-fold protocol on classic multiple-instance sets."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

import attention
from kernels.errors import InputError
from tasks.common.crossval import Fold
from tasks.common.folds import only_these
from tasks.common.runs import open_run
from tasks.wsi_mil.data import Case, Cohort, FeatureCache
from tasks.wsi_mil.features import BagInfo
from tasks.wsi_mil.results import chosen_attention
from tasks.wsi_mil.targets import Target, infer_kind
from tasks.wsi_mil.train import cross_validate, plan_folds

log = logging.getLogger(__name__)


def run(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Cross-validate on one NPZ file; the published folds are used when ``<name>_folds.npz`` lies beside it."""
    if cfg.data.path is None:
        raise InputError("data=mil_benchmark needs data.path=NAME.npz with the arrays x, bag and y.")
    path = Path(cfg.data.path)
    cfg = with_protocol(cfg)
    cohort, cache = load_benchmark(path)
    published = published_folds(path, cohort)
    folds = plan_folds(cohort, cfg) if published is None else only_these(published, cfg.crossval.only)
    with open_run(cfg, out, inputs=[path]) as current:
        return cross_validate(cohort, folds, cfg, current, cache)


def with_protocol(cfg: DictConfig) -> DictConfig:
    """The configuration with ``data.pooler`` moved into ``attention``.

    Only what the pooler takes is moved, and nothing that was chosen on the command line. The configuration saved with
    the run holds the outcome, so that repeating it moves nothing again.
    """
    if cfg.data.pooler is None:
        return cfg
    chosen = chosen_attention(cfg)
    accepted = attention.parameters_of(chosen["name"])
    own = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    given = {str(override).lstrip("+").split("=")[0].removeprefix("attention.") for override in own}
    protocol = {str(k): v for k, v in cfg.data.pooler.items() if k in accepted and k not in given}
    merged = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(cfg)), {"attention": {**chosen, **protocol}})
    assert isinstance(merged, DictConfig)
    merged.data.pooler = None
    return merged


def load_benchmark(path: Path) -> tuple[Cohort, FeatureCache]:
    """Bags of one file, all in memory.

    Raises:
        InputError: not an NPZ file with the three arrays, or arrays that do not fit together.
    """
    arrays = _read_npz(path, ("x", "bag", "y"))
    x, bag, y = arrays["x"], arrays["bag"], arrays["y"]
    if x.ndim != 2 or bag.shape != (len(x),) or y.ndim != 1:
        raise InputError(
            f"{path}: x is {x.shape}, bag {bag.shape}, y {y.shape}; they must be (n, d), (n,) and (bags,)."
        )
    if not np.isfinite(x).all():
        raise InputError(f"{path}: x holds NaN or infinite values.")
    if not np.isin(bag, np.arange(len(y))).all():
        raise InputError(f"{path}: bag holds indices outside 0 to {len(y) - 1}, the number of labels in y.")
    names = np.unique(y)
    order = np.argsort(bag, kind="stable")
    features = torch.from_numpy(np.ascontiguousarray(x[order], dtype=np.float32))
    lengths = np.bincount(bag, minlength=len(y)).tolist()
    cache = FeatureCache()
    width = len(str(len(y) - 1))
    cases = []
    for index, part in enumerate(features.split(lengths)):
        if len(part) == 0:
            raise InputError(f"{path}: bag {index} has no instances.")
        identifier = f"bag_{index:0{width}d}"
        info = BagInfo(identifier, path, len(part), x.shape[1], "benchmark", str(index))
        case = Case(identifier, identifier, int(np.searchsorted(names, y[index])), (info,))
        cache.put(case, part)
        cases.append(case)
    classes = tuple(str(name) for name in names)
    return Cohort(tuple(cases), Target(infer_kind("auto", classes, 1), classes), x.shape[1]), cache


def published_folds(path: Path, cohort: Cohort) -> list[Fold] | None:
    """The folds beside the data, ``train_mask (repeats, folds, bags)``; None when there is no such file."""
    beside = path.with_name(f"{path.stem}_folds.npz")
    if not beside.exists():
        return None
    masks = _read_npz(beside, ("train_mask",))["train_mask"].astype(bool)
    if masks.ndim != 3 or masks.shape[2] != len(cohort.cases):
        raise InputError(f"{beside}: train_mask is {masks.shape}; it must be (repeats, folds, {len(cohort.cases)}).")
    log.info("using the published folds in %s", beside)
    ids = np.array([case.case_id for case in cohort.cases])
    return [
        Fold(list(ids[mask]), [], list(ids[~mask]), repeat * len(folds) + number, repeat)
        for repeat, folds in enumerate(masks)
        for number, mask in enumerate(folds)
    ]


def _read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"data.path={path} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise InputError(f"{path} has no array '{missing[0]}'; it holds {', '.join(archive.files)}.")
            return {name: archive[name] for name in names}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as an NPZ file ({str(error).splitlines()[0]}).") from error

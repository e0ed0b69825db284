"""``action=prepare``: slides to tissue, tiles and features, one file per slide, resumable.

``out`` holds ``features/ID.h5``, ``thumbnails/ID.jpg``, ``contours/ID.jpg`` (outlines drawn),
``contours_geojson/ID.geojson`` and ``slides.csv``.

A slide whose feature file is complete, undamaged and made with the present settings is skipped;
one that was cut off goes on at the batch where it was; a slide that fails leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from kernels.errors import InputError
from tasks.common.files import explain_os_errors
from tasks.wsi_mil import features as bags
from tasks.wsi_mil.cohort import SlideFile, SlideReport, find_slides
from tasks.wsi_mil.cohort_work import CohortWork, feature_path
from tasks.wsi_mil.prepare_options import PrepareOptions


def run(cfg: DictConfig) -> list[SlideReport]:
    """``action=prepare`` of a composed configuration (``data``, ``backbone``, ``out``, ``seed``, ``dry_run``).

    Raises:
        InputError: something given is wrong, or some slides failed (after all were tried).
    """
    if not cfg.data.get("slides"):
        raise InputError("data.slides is not set; give a folder of slides, a slide, or a CSV that lists them.")
    options = PrepareOptions.from_config(cfg.data)
    slides = find_slides(cfg.data.slides)
    from backbones import create_encoder

    backbone = cfg.backbone
    params: Any = OmegaConf.to_container(backbone.params, resolve=True) if backbone.get("params") else None
    encoder = create_encoder(
        backbone.name,
        pretrained=bool(backbone.get("pretrained", False)),
        checkpoint=backbone.get("checkpoint"),
        seed=cfg.get("seed", 1),
        params=params,
    )
    out = Path(cfg.out)
    if cfg.get("dry_run"):
        from tasks.wsi_mil.progress import show_plan

        reports = plan_cohort(slides, out, encoder, options)
        show_plan(reports, out)
        return reports
    reports = prepare_cohort(slides, out, encoder, options)
    raise_if_failed(reports, out)
    return reports


def raise_if_failed(reports: Sequence[SlideReport], out: Path) -> None:
    """One sentence when slides failed.

    Raises:
        InputError: some did.
    """
    failed = [r for r in reports if r.status == "failed"]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(reports)} slides failed, first '{failed[0].slide_id}': "
            f"{failed[0].reason.rstrip('.')}; "
            f"all reasons are in {out / 'slides.csv'}, the other slides are done."
        )


def prepare_slide(
    path: str | Path,
    out: str | Path,
    encoder: nn.Module,
    options: PrepareOptions | None = None,
    *,
    slide_id: str | None = None,
) -> bags.BagInfo:
    """Prepare one slide into ``out`` (skipped when it is complete there) and return its bag.

    Raises:
        InputError: the slide cannot be prepared.
    """
    path = Path(path)
    slide = SlideFile(slide_id or path.stem, path)
    (report,) = prepare_cohort([slide], out, encoder, options, progress=False)
    if report.status == "failed":
        raise InputError(report.reason)
    if report.status == "skipped" and report.tiles is None:
        raise InputError(f"slide '{slide.slide_id}': {report.reason}; wait for it, or use another folder with out=DIR.")
    return bags.find_bags(feature_path(Path(out), slide.slide_id))[slide.slide_id]


def prepare_cohort(
    slides: Sequence[SlideFile],
    out: str | Path,
    encoder: nn.Module,
    options: PrepareOptions | None = None,
    *,
    progress: bool = True,
) -> list[SlideReport]:
    """Prepare slides into ``out``; one report each, in the given order. See the module for what is written.

    Args:
        encoder: takes uint8 RGB tiles (B, 3, H, W), returns (B, dim); has ``name``, ``dim`` and ``weights``.
        progress: show bars on a terminal.

    Raises:
        InputError: nothing can be written to ``out`` (a slide that fails is reported, not raised).
    """
    work = CohortWork(slides, Path(out), encoder, options or PrepareOptions())
    _make_folder(work.out)
    work.skip_complete()
    if work.todo:
        work.extract(progress)
    return [work.reports[slide.slide_id] for slide in slides]


def plan_cohort(
    slides: Sequence[SlideFile], out: str | Path, encoder: nn.Module, options: PrepareOptions | None = None
) -> list[SlideReport]:
    """What ``prepare_cohort`` would do, with the number of tiles of each slide; nothing is written."""
    work = CohortWork(slides, Path(out), encoder, options or PrepareOptions())
    reports = []
    for slide in slides:
        done, why = work.completed(slide)
        reports.append(done or work.estimate(slide, why))
    return reports


def _make_folder(folder: Path) -> None:
    try:
        with explain_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"cannot write {folder}: a file is in the way; choose another folder with out=DIR.") from error

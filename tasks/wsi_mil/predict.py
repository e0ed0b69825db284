"""``action=predict``: slides, or features made before, to class probabilities, heat maps and files for other programs.

For every slide a folder ``<out>/<slide_id>/`` (see ``slide_outputs``), and for all of them ``<out>/predictions.csv``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Column, Table

from kernels.errors import InputError
from tasks.common.checkpoints import find_checkpoints
from tasks.common.devices import device_for
from tasks.common.files import atomic_path
from tasks.common.runs import open_run
from tasks.wsi_mil.checkpoint import SlideClassifier, SlidePrediction, load_classifier
from tasks.wsi_mil.features import (
    BagInfo,
    TileCoords,
    check_bag,
    find_bags,
    read_attributes,
    read_coords,
    read_features,
)
from tasks.wsi_mil.predict_inputs import PredictInput, find_inputs
from tasks.wsi_mil.rebuild import prepare_options, rebuild_encoder
from tasks.wsi_mil.slide_outputs import MapSettings, known_mpp, write_outputs
from tasks.wsi_mil.slides import Slide, open_slide

log = logging.getLogger(__name__)

_RECORD = "prediction.json"  # written last: a folder without it is not finished
_SHOWN_ROWS = 40


def run(cfg: DictConfig, out: Path) -> list[dict[str, Any]]:
    """Predict every slide or feature file of ``input`` with ``checkpoint``; returns the rows of ``predictions.csv``.

    What is complete in ``out`` already, with the same checkpoint, settings and input file, is not done again. A slide
    that fails is reported and the others go on.

    Raises:
        InputError: no or a wrong checkpoint, input or option; or, at the end, some slides failed.
    """
    if cfg.checkpoint is None:
        raise InputError("action=predict needs checkpoint=RUN, a run folder, a fold folder or a model.safetensors.")
    settings = MapSettings.from_config(cfg.predict)
    checkpoints = find_checkpoints(Path(cfg.checkpoint))
    classifier = load_classifier(Path(cfg.checkpoint))
    slides = None if cfg.data.get("slides") is None else Path(cfg.data.slides)
    inputs = find_inputs(cfg.input, slides)
    if cfg.dry_run:
        for item in inputs:
            source = item.slide if item.bag is None else item.bag.path
            log.info("would predict %s from %s with %d models", item.slide_id, source, len(classifier.models))
        return []
    with open_run(cfg, out, inputs=checkpoints) as current:
        classifier.to(device_for(cfg.inference.device))
        predictor = Predictor(classifier, settings, cfg, current.folder, _digest(checkpoints))
        rows, failures = predictor.predict_all(inputs)
        _print_table(rows, failures, classifier)
        if failures:
            raise InputError(_failed(failures, len(inputs), current.folder))
        current.finish()
    return rows


class Predictor:
    """A classifier with the place and form of its outputs.

    Args:
        out: the run folder.
        identity: stands for the checkpoint's content in the record of each slide.
    """

    def __init__(
        self, classifier: SlideClassifier, settings: MapSettings, cfg: DictConfig, out: Path, identity: str
    ) -> None:
        self.classifier = classifier
        self.settings = settings
        self.cfg = cfg
        self.out = out
        self.identity = identity

    def predict_all(self, inputs: Sequence[PredictInput]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Rows of the finished slides and sentences about the failed ones, by id; both tables are kept up to date."""
        done = {item.slide_id: row for item in inputs if (row := self._finished(item)) is not None}
        if done:
            log.info("%d of %d are finished already", len(done), len(inputs))
        left = [item for item in inputs if item.slide_id not in done]
        failures: dict[str, str] = {}
        bags = self._features_of([item for item in left if item.bag is None and item.slide is not None], failures)
        for item in left:
            bag = item.bag if item.bag is not None else bags.get(item.slide_id)
            if bag is None:
                continue
            try:
                done[item.slide_id] = self.predict_one(item, bag)
            except InputError as error:
                failures[item.slide_id] = str(error)
                log.error("%s", error)
            except Exception as error:
                # A fault of ours on one slide must not cost a night's work on the others; its trace is in the log.
                failures[item.slide_id] = f"{item.slide_id}: {type(error).__name__}: {error}"
                log.exception("%s failed unexpectedly", item.slide_id)
            self._write_tables(inputs, done, failures)
        self._write_tables(inputs, done, failures)
        return [done[item.slide_id] for item in inputs if item.slide_id in done], failures

    def predict_one(self, item: PredictInput, bag: BagInfo) -> dict[str, Any]:
        """Predict one slide from its features and write its folder; returns its row of the table.

        Raises:
            InputError: the slide or its features cannot be used.
        """
        started = time.perf_counter()
        check_made_by(bag, self.classifier)
        check_bag(bag)
        prediction = self.classifier.predict(torch.from_numpy(read_features(bag)))
        row = result_row(item.slide_id, prediction, self.classifier)
        folder = self.out / item.slide_id
        with contextlib.ExitStack() as stack:
            slide, coords = _slide_and_coords(item, bag, stack)
            about = {"slide_id": item.slide_id, "checkpoint": str(self.cfg.checkpoint), **self.classifier.tiles}
            title = headline(row, self.classifier)
            files = write_outputs(folder, title, self.classifier, prediction, coords, slide, self.settings, about)
        if item.bag is None and not self.settings.keep_features:
            bag.path.unlink(missing_ok=True)
        row |= {"tiles": bag.num_tiles, "seconds": round(time.perf_counter() - started, 2)}
        record = {"key": self._key(item), "files": files, "row": row}
        with atomic_path(folder / _RECORD) as temporary:
            temporary.write_text(json.dumps(record, indent=2))
        log.info("%s (%.1f s, %s)", title, row["seconds"], folder)
        return row

    def _features_of(self, items: Sequence[PredictInput], failures: dict[str, str]) -> dict[str, BagInfo]:
        """Features of slides, made as the checkpoint's were; slides that cannot be prepared go to ``failures``."""
        if not items:
            return {}
        from tasks.wsi_mil.cohort import SlideFile
        from tasks.wsi_mil.cohort_work import feature_path
        from tasks.wsi_mil.prepare import prepare_cohort

        encoder = rebuild_encoder(self.classifier.encoder, self.cfg.backbone)
        slides = [SlideFile(item.slide_id, item.slide) for item in items if item.slide is not None]
        folder = self.out / "prepared"
        bags: dict[str, BagInfo] = {}
        for report in prepare_cohort(slides, folder, encoder, prepare_options(self.classifier.tiles, self.cfg)):
            if report.status in ("done", "skipped") and report.tiles is not None:
                bags |= find_bags(feature_path(folder, report.slide_id))
            else:
                failures[report.slide_id] = report.reason
        return bags

    def _key(self, item: PredictInput) -> dict[str, Any]:
        source = item.bag.path if item.bag is not None else item.slide
        assert source is not None
        state = source.stat()
        return {
            "checkpoint": self.identity,
            "settings": asdict(self.settings),
            "slide": None if item.slide is None else str(item.slide.resolve()),
            "source": [str(source.resolve()), state.st_size, state.st_mtime_ns],
        }

    def _finished(self, item: PredictInput) -> dict[str, Any] | None:
        """The row of a slide that was finished before under the same conditions, else None."""
        folder = self.out / item.slide_id
        try:
            record = json.loads((folder / _RECORD).read_text())
            same = record["key"] == self._key(item) and all((folder / name).is_file() for name in record["files"])
        except (OSError, ValueError, KeyError):
            return None
        return dict(record["row"]) if same else None

    def _write_tables(
        self, inputs: Sequence[PredictInput], done: Mapping[str, dict[str, Any]], failures: Mapping[str, str]
    ) -> None:
        rows = [done[item.slide_id] for item in inputs if item.slide_id in done]
        with atomic_path(self.out / "predictions.csv") as temporary:
            table = pd.DataFrame(rows, columns=_columns(self.classifier))
            table.to_csv(temporary, index=False, float_format="%.6g")
        if not failures:
            (self.out / "failures.csv").unlink(missing_ok=True)
            return
        with atomic_path(self.out / "failures.csv") as temporary:
            pd.DataFrame(failures.items(), columns=["slide_id", "reason"]).to_csv(temporary, index=False)


def result_row(slide_id: str, prediction: SlidePrediction, classifier: SlideClassifier) -> dict[str, Any]:
    """Prediction, probability of each class, and its standard deviation over the models (None for a single model)."""
    predicted = classifier.target.predicted(prediction.probabilities[None])[0]
    if classifier.target.kind == "multilabel":
        name = ";".join(c for c, on in zip(classifier.classes, predicted.tolist(), strict=True) if on) or "none"
    else:
        name = classifier.classes[int(predicted)]
    spread = prediction.model_probabilities.std(0, correction=0).tolist()
    several = len(prediction.model_probabilities) > 1
    row: dict[str, Any] = {"slide_id": slide_id, "predicted": name}
    row |= {f"p_{c}": p for c, p in zip(classifier.classes, prediction.probabilities.tolist(), strict=True)}
    return row | {f"sd_{c}": s if several else None for c, s in zip(classifier.classes, spread, strict=True)}


def headline(row: Mapping[str, Any], classifier: SlideClassifier) -> str:
    """One line for titles and the log, such as ``S-04: tumour 0.93 ± 0.02 (5 models)``."""
    named = classifier.classes if classifier.target.kind == "multilabel" else [row["predicted"]]
    parts = ", ".join(f"{name} {_with_spread(row, name)}" for name in named)
    count = len(classifier.models)
    return f"{row['slide_id']}: {parts}" + (f" ({count} models)" if count > 1 else "")


def check_made_by(bag: BagInfo, classifier: SlideClassifier) -> None:
    """Refuse features that the model cannot have learnt from.

    Raises:
        InputError: another feature size, or, where both sides say so, another encoder or other weights of it.
    """
    encoder, about = classifier.encoder, read_attributes(bag)
    known = f" ('{encoder['name']}')" if encoder.get("name") else ""
    if bag.dim != classifier.description.dim:
        raise InputError(
            f"{bag.path}: the features of '{bag.slide_id}' have {bag.dim} values per tile and the model was trained on "
            f"{classifier.description.dim}; use features of the encoder it was trained with{known}."
        )
    compared = (("name", "encoder", "encoder"), ("fingerprint", "weights_fingerprint", "weights"))
    for key, attribute, what in compared:
        ours, theirs = encoder.get(key), about.get(attribute)
        if ours and theirs and str(ours) != str(theirs):
            raise InputError(
                f"{bag.path}: the features of '{bag.slide_id}' were made with {what} '{theirs}' and the model was "
                f"trained with {what} '{ours}'{known if key != 'name' else ''}; prepare the slide with that one."
            )


def check_fits(coords: TileCoords, slide: Slide, bag: BagInfo) -> None:
    """Raise InputError when tiles begin outside the slide: the features are those of another file."""
    low, high = coords.xy.min(0), coords.xy.max(0)
    if (low <= -coords.size).any() or (high >= slide.dimensions).any():
        raise InputError(
            f"{bag.path}: tiles of '{bag.slide_id}' lie from {tuple(low.tolist())} to {tuple(high.tolist())}, outside "
            f"the {slide.dimensions[0]} x {slide.dimensions[1]} pixels of {slide.path}; give the slide they were made "
            "from."
        )


def _slide_and_coords(
    item: PredictInput, bag: BagInfo, stack: contextlib.ExitStack
) -> tuple[Slide | None, TileCoords | None]:
    """The slide, opened, and where its tiles are; whatever of the two is known."""
    about = read_attributes(bag)
    path = item.slide
    if path is None and about.get("slide_path") and Path(str(about["slide_path"])).is_file():
        path = Path(str(about["slide_path"]))
    if path is None:
        try:
            return None, read_coords(bag)
        except InputError as error:  # positions in micrometres, which only the slide can place
            log.warning("%s", error)
            return None, None
    # The resolution the tiles were cut at goes before the header's: it may have been overridden.
    slide = stack.enter_context(open_slide(path, about.get("level0_mpp")))
    coords = read_coords(bag, known_mpp(slide))
    if coords is not None:
        check_fits(coords, slide, bag)
    return slide, coords


def _with_spread(row: Mapping[str, Any], name: str) -> str:
    spread = row[f"sd_{name}"]
    return f"{row[f'p_{name}']:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _columns(classifier: SlideClassifier) -> list[str]:
    per_class = [f"{prefix}_{name}" for prefix in ("p", "sd") for name in classifier.classes]
    return ["slide_id", "predicted", *per_class, "tiles", "seconds"]


def _print_table(rows: Sequence[Mapping[str, Any]], failures: Mapping[str, str], classifier: SlideClassifier) -> None:
    """The results on the terminal, at most a screenful."""
    several = len(classifier.models) > 1
    caption = f"mean ± standard deviation over {len(classifier.models)} models" if several else None
    slide = Column("slide", overflow="fold")  # an id cut short says nothing
    table = Table(slide, "predicted", *classifier.classes, "tiles", "seconds", caption=caption)
    for row in rows[:_SHOWN_ROWS]:
        probabilities = [_with_spread(row, name) for name in classifier.classes]
        table.add_row(row["slide_id"], row["predicted"], *probabilities, str(row["tiles"]), f"{row['seconds']:.1f}")
    for slide_id in list(failures)[: max(0, _SHOWN_ROWS - len(rows))]:
        table.add_row(slide_id, "[red]failed[/red]")
    console = Console()
    console.print(table)
    hidden = len(rows) + len(failures) - _SHOWN_ROWS
    if hidden > 0:
        console.print(f"... and {hidden} more in predictions.csv")


def _failed(failures: Mapping[str, str], total: int, out: Path) -> str:
    first = next(iter(failures.values())).rstrip(".")
    rest = f"; all reasons are in {out / 'failures.csv'}" if len(failures) > 1 else ""
    return f"{len(failures)} of {total} failed: {first}{rest}."


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()[:16]

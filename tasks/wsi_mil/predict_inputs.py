"""What ``input=`` means: slides, feature files, or folders of either, as one list of things to predict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kernels.errors import InputError
from tasks.common.files import safe_id
from tasks.wsi_mil.cohort import find_slides
from tasks.wsi_mil.features import BagInfo, find_bags
from tasks.wsi_mil.layouts import feature_files
from tasks.wsi_mil.slides import SUFFIXES, files_of_slides

_FEATURE_SUFFIXES = (".h5", ".hdf5", ".pt", ".npy")


@dataclass(frozen=True)
class PredictInput:
    """One thing to predict.

    Attributes:
        slide_id: as a string; the name of its folder in the output.
        slide: the slide file, when it is known.
        bag: its features, when they were made before.
    """

    slide_id: str
    slide: Path | None = None
    bag: BagInfo | None = None


def find_inputs(given: Any, slides: Path | None = None) -> list[PredictInput]:
    """Everything named by ``input=``, sorted by id.

    Args:
        given: a path or a list of paths: slide files, feature files, folders of either or both. A slide that lies
            beside its own features (same name) is predicted once, from the features.
        slides: ``data.slides``: where the slides of feature files are looked up, for their maps.

    Raises:
        InputError: nothing given or found, a path that does not exist, or one id for two files.
    """
    paths = [Path(str(path)) for path in _as_list(given)]
    if not paths:
        raise InputError(
            "action=predict needs input=PATH: a slide, a feature file, a folder of either, or a list of them."
        )
    slide_files: dict[str, Path] = {}
    bags: dict[str, BagInfo] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"input={path} does not exist.")
        for file in _slides_in(path):
            _add(slide_files, safe_id(file.stem, str(file)), file)
        if path.is_dir() and next(iter(feature_files(path)), None) is None:
            continue
        if path.is_dir() or path.suffix.lower() in _FEATURE_SUFFIXES:
            for slide_id, bag in find_bags(path).items():
                _add(bags, slide_id, bag)
    if not slide_files and not bags:
        kinds = ", ".join([*SUFFIXES, *_FEATURE_SUFFIXES])
        raise InputError(f"input={', '.join(map(str, paths))} holds no slide and no features; looked for {kinds}.")
    known = dict(slide_files)
    if slides is not None and bags:
        for found in find_slides(slides):
            known.setdefault(found.slide_id, found.path)
    ids = sorted(slide_files.keys() | bags.keys())
    return [PredictInput(slide_id, known.get(slide_id), bags.get(slide_id)) for slide_id in ids]


def _as_list(given: Any) -> Sequence[Any]:
    if given is None:
        return []
    return [given] if isinstance(given, str | Path) else list(given)


def _slides_in(path: Path) -> Iterable[Path]:
    if path.is_dir():
        return files_of_slides(path)
    if path.suffix.lower() in _FEATURE_SUFFIXES:
        return []
    # A single file is taken at its word, whatever its suffix: OpenSlide looks at the content.
    return [path]


def _add(found: dict[str, Any], slide_id: str, item: Any) -> None:
    other = found.get(slide_id)
    if other is not None and other != item:
        first, second = (getattr(entry, "path", entry) for entry in (other, item))
        raise InputError(
            f"input: '{slide_id}' stands for two files, {first} and {second}; rename one or give one only."
        )
    found[slide_id] = item

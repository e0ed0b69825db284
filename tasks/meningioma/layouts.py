"""How data sets lie on a disk; nothing is opened but JSON and CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from kernels.errors import unknown_name
from tasks.common.wording import quoted
from tasks.meningioma.layout_folders import list_folders
from tasks.meningioma.layout_nnunet import list_nnunet
from tasks.meningioma.layout_table import list_table
from tasks.meningioma.listing import Listing


def list_cases(path: Path, settings: DictConfig) -> Listing:
    """The cases of a set in the layout ``data.format``, or in the one that is found.

    Raises:
        InputError: the layout cannot be told, or its files cannot be understood.
    """
    layouts: dict[str, Callable[[Path, DictConfig], Listing]] = {
        "nnunet": list_nnunet,
        "folders": list_folders,
        "csv": list_table,
    }
    name = settings.format
    if name == "auto":
        name = "csv" if path.is_file() else "nnunet" if (path / "dataset.json").is_file() else "folders"
    if name not in layouts:
        raise unknown_name("data.format", str(name), ["auto", *layouts])
    listing = layouts[name](path, settings)
    twice = [i for i, count in Counter(case.case_id for case in listing.cases).items() if count > 1]
    if twice:
        listing.problems.append(f"{path} has more than one case called {quoted(twice)}; every case needs its own id.")
    if settings.channel is not None:
        listing.cases = [replace(c, channels=(int(settings.channel),) * len(c.images)) for c in listing.cases]
    listing.cases.sort(key=lambda case: case.case_id)
    return listing

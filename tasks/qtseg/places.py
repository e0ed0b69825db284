"""Where results may be written: never among the images."""

from __future__ import annotations

from pathlib import Path

from kernels.errors import InputError
from tasks.qtseg.checking import roots
from tasks.qtseg.data import ImageSet2D


def refuse_inside(out: Path, images: ImageSet2D) -> None:
    """Refuse an output folder in a folder of images or masks, where its pictures would be taken for more of them.

    Raises:
        InputError: ``out`` is, or lies in, a folder that holds files of the set.
    """
    refuse_within(out, {folder.resolve() for folder in roots(images)})


def refuse_within(out: Path, folders: set[Path]) -> None:
    """The same for folders as they are."""
    place = out.resolve()
    inside = next((folder for folder in (place, *place.parents) if folder in folders), None)
    if inside is not None:
        raise InputError(f"out={out} lies in {inside}, which holds the images; choose a folder beside it.")

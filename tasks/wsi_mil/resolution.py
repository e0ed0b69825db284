"""How many micrometres one pixel of a slide is, from whatever the scanner wrote; never a guess.

Scanners and converters put the resolution in different places. They are tried in a fixed order, and the place that
answered is reported. A value no microscope has (a TIFF whose 72 or 96 dots per inch are a default of the program that
wrote it) is passed over. The objective power is not used: "20x" is 0.5 µm on one scanner and 0.23 µm on another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kernels.errors import InputError

# µm per pixel. 10 000 dots per inch is 2.54 µm; flat-bed and screen values (72 to 1200 dpi: 353 to 21 µm) lie above.
PLAUSIBLE = (0.02, 20.0)
_NUMBER = r"([0-9]+(?:[.,][0-9]+)?(?:[eE][-+]?[0-9]+)?)"
_MPP_IN_TEXT = re.compile(r"\bMPP\s*=\s*" + _NUMBER)
_OME_SIZE = re.compile(r"\bPhysicalSizeX\s*=\s*[\"']" + _NUMBER + r"[\"']")
_OME_UNIT = re.compile(r"\bPhysicalSizeXUnit\s*=\s*[\"']([^\"']+)[\"']")
_MICROMETRES = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "Å": 1e-4}
_PER_UNIT = {"centimeter": 1e4, "centimetre": 1e4, "cm": 1e4, "inch": 25400.0}


@dataclass(frozen=True)
class Resolution:
    """Micrometres per pixel at level 0 and the place they were read from."""

    mpp: float
    source: str


def find_resolution(properties: Mapping[str, str], slide: str, override: float | None = None) -> Resolution:
    """Micrometres per pixel of level 0.

    Args:
        properties: OpenSlide's properties of the slide (names as OpenSlide gives them).
        slide: how the slide is called in the message.
        override: what the user says it is; wins over the header.

    Raises:
        InputError: nothing plausible is in the header and nothing was given.
    """
    if override is not None:
        return Resolution(checked_mpp(override, f"the resolution given for slide '{slide}'"), "given by the user")
    passed_over = []
    for mpp, source in _candidates(properties):
        if PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]:
            return Resolution(mpp, source)
        passed_over.append(f"{source} = {mpp:.4g} µm per pixel, which no microscope has")
    found = f"; passed over: {'; '.join(passed_over)}" if passed_over else ""
    raise InputError(
        f"slide '{slide}': its header does not say how many micrometres a pixel is{found}. Add a line '{slide},0.5' "
        "to a CSV with the columns slide_id,mpp and give data.mpp_overrides=FILE, or set data.mpp_override=0.5 for all "
        "slides, or convert the slide again with its resolution kept."
    )


def checked_mpp(value: object, where: str) -> float:
    """``value`` as a number of micrometres per pixel.

    Raises:
        InputError: it is no number, or outside what a microscope gives.
    """
    mpp = _number(str(value))
    if mpp is None or not PLAUSIBLE[0] <= mpp <= PLAUSIBLE[1]:
        raise InputError(
            f"{where} is {value!r}; give micrometres per pixel between {PLAUSIBLE[0]} and {PLAUSIBLE[1]:g} (0.25 is "
            "about 40x)."
        )
    return mpp


def read_mpp_table(path: str | Path) -> dict[str, float]:
    """Resolutions from a CSV with the columns ``slide_id`` (or ``wsi``, ``slide``) and ``mpp``.

    The keys are file names or slide ids, as strings.

    Raises:
        InputError: the file or a column is missing, a value is no resolution, or one slide has two values.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(f"data.mpp_overrides={path} cannot be read as CSV ({_one_line(error)}).") from error
    names = [c for c in ("slide_id", "wsi", "slide") if c in table.columns]
    if not names or "mpp" not in table.columns:
        raise InputError(
            f"data.mpp_overrides={path} has the columns {', '.join(map(str, table.columns))}; it needs slide_id (or "
            "wsi) and mpp."
        )
    found: dict[str, float] = {}
    for row, (name, value) in enumerate(zip(table[names[0]], table["mpp"], strict=True), start=2):
        mpp = checked_mpp(value, f"{path} line {row}: mpp of '{name}'")
        if found.setdefault(name, mpp) != mpp:
            raise InputError(
                f"{path} line {row}: slide '{name}' has both mpp {found[name]:g} and {mpp:g}; keep one line."
            )
    return found


def _candidates(properties: Mapping[str, str]) -> Iterator[tuple[float, str]]:
    """(µm per pixel, where from) of each place that holds a number, the most trustworthy first."""
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x is not None:
        yield math.sqrt(x * (x if y is None else y)), "openslide.mpp-x"
    for key in ("openslide.mirax.MPP", "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X", "aperio.MPP"):
        if (value := _number(properties.get(key))) is not None:
            yield value, key
    if (value := _number(properties.get("hamamatsu.XResolution"))) is not None:
        # Micrometres per pixel in some files, pixels per centimetre in others; the two ranges are far apart.
        yield (1e4 / value if value >= 1e4 / PLAUSIBLE[1] else value), "hamamatsu.XResolution"
    for key in ("openslide.comment", "tiff.ImageDescription"):
        text = properties.get(key, "")
        if match := _MPP_IN_TEXT.search(text):
            yield _parsed(match[1]), f"'MPP =' in {key}"
        if match := _OME_SIZE.search(text):
            unit = _OME_UNIT.search(text)
            scale = _MICROMETRES.get(unit[1] if unit else "µm")
            if scale is not None:
                yield _parsed(match[1]) * scale, f"OME PhysicalSizeX in {key}"
    per = _PER_UNIT.get(properties.get("tiff.ResolutionUnit", "").lower())
    if per is not None and (value := _number(properties.get("tiff.XResolution"))) is not None:
        yield per / value, "tiff.XResolution"


def _number(text: str | None) -> float | None:
    """A positive finite number, decimal point or comma, or None."""
    return _parsed(text.strip()) if text and re.fullmatch(_NUMBER, text.strip()) and _parsed(text.strip()) > 0 else None


def _parsed(text: str) -> float:
    return float(text.replace(",", "."))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())

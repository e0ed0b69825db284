"""How slides become features: the options of ``action=prepare``, checked before the first slide is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kernels.errors import InputError
from tasks.wsi_mil.resolution import checked_mpp
from tasks.wsi_mil.tiling import plan_tiles
from tasks.wsi_mil.tissue import TissueOptions


@dataclass(frozen=True)
class PrepareOptions:
    """How slides become features.

    Attributes:
        mpp, tile: micrometres per pixel and side of the tiles; None takes what the encoder was trained on.
        overlap: of neighbouring tiles, pixels of the tile.
        min_tissue: smallest share of a tile that must be tissue.
        mpp_tolerance: relative difference within which a level of the slide is used as it is.
        mpp_override: resolution of every slide, in place of its header's.
        mpp_overrides: CSV of resolutions per slide.
        tissue: how tissue is found.
        float16: store features in half the bytes.
        on_bad_tile: ``error`` fails the slide, ``white`` puts a white tile in the place of an unreadable one.
        workers: reading processes, or ``auto``.
        batch_size: tiles per batch, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        amp: compute in half precision on a GPU.
    """

    mpp: float | None = None
    tile: int | None = None
    overlap: int = 0
    min_tissue: float = 0.25
    mpp_tolerance: float = 0.05
    mpp_override: float | None = None
    mpp_overrides: Path | None = None
    tissue: TissueOptions = field(default_factory=TissueOptions)
    float16: bool = False
    on_bad_tile: str = "error"
    workers: int | str = "auto"
    batch_size: int | str = "auto"
    device: str = "auto"
    amp: bool = True

    def __post_init__(self) -> None:
        if self.on_bad_tile not in ("error", "white"):
            raise InputError(f"data.on_bad_tile={self.on_bad_tile} is not known; use error or white.")
        if self.batch_size != "auto" and not (str(self.batch_size).isdigit() and int(self.batch_size) > 0):
            raise InputError(f"data.batch_size={self.batch_size} is no number of tiles; use auto or a positive number.")
        if not 0 <= self.min_tissue <= 1:
            raise InputError(
                f"data.min_tissue={self.min_tissue} is a share of a tile's area; give a number from 0 to 1."
            )
        if self.mpp is not None:
            checked_mpp(self.mpp, "data.mpp")
        if self.mpp_override is not None:
            checked_mpp(self.mpp_override, "data.mpp_override")
        # Any slide would do: what does not depend on the slide is wrong now, not after the first one is read.
        tile = self.tile if self.tile is not None else 224
        plan_tiles(
            "", (1, 1), 1.0, [1.0], requested_mpp=1.0, tile=tile, overlap=self.overlap, tolerance=self.mpp_tolerance
        )

    @classmethod
    def from_config(cls, data: DictConfig) -> PrepareOptions:
        """From the ``data`` group of a run's configuration; keys that are not of this class are left to others."""
        given: dict[str, Any] = OmegaConf.to_container(data, resolve=True)  # type: ignore[assignment]
        options = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        tissue = dict(options.pop("tissue", None) or {})
        if tissue.get("annotations"):
            tissue["annotations"] = Path(tissue["annotations"])
            if not tissue["annotations"].is_dir():
                raise InputError(
                    f"data.tissue.annotations={tissue['annotations']} is no folder; give the one with "
                    "SLIDE_ID.geojson files."
                )
        if options.get("mpp_overrides"):
            options["mpp_overrides"] = Path(options["mpp_overrides"])
        return cls(**options, tissue=TissueOptions(**tissue))

"""Backbones as encoders: which of their maps a decoder needs, and the pyramid that gives these alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import backbones
from backbones import registry, swap
from kernels.errors import InputError

Wanted = Callable[[Sequence[float]], Sequence[int]]
"""From the strides of all maps of a backbone, in the order of depth, to the indices of those that are needed."""


class Backbone:
    """A backbone that was chosen, not built yet.

    Args:
        chosen: ``name`` and, where wanted, ``params``, ``pretrained`` and ``checkpoint``, as in ``conf/backbone``.
        in_channels: of the images.
        size: side of the images, or (height, width), where it is known.

    Raises:
        InputError: there is no name.
    """

    def __init__(
        self, chosen: Mapping[str, Any] | str, in_channels: int, size: int | Sequence[int] | None = None
    ) -> None:
        chosen = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
        if not isinstance(chosen.get("name"), str):
            raise InputError(f"backbone={chosen} has no name; see python -m backbones for those that there are.")
        self.name: str = chosen["name"]
        self.pretrained = bool(chosen.get("pretrained"))
        self.checkpoint = chosen.get("checkpoint")
        self.params: dict[str, Any] = dict(chosen.get("params") or {})
        self.own = registry.is_dotted_path(self.name)
        self.params.setdefault("in_chans", in_channels)
        if size is not None and not self.own:
            self.params.setdefault("img_size", size if isinstance(size, int) else tuple(size))
        self._sketch: nn.Module | None = None

    def arguments(self, mixer: Any = None) -> dict[str, Any]:
        """What :func:`backbones.create` is given, beside the maps."""
        found: dict[str, Any] = {"name": self.name, "pretrained": self.pretrained, **self.params}
        if self.checkpoint is not None:
            found["checkpoint"] = self.checkpoint
        return found | ({} if mixer is None else {"attention": mixer})

    @property
    def sketch(self) -> nn.Module:
        """The network without numbers: with its structure and nothing else."""
        if self._sketch is None:
            params = {key: value for key, value in self.params.items() if key not in ("out_indices", "out_strides")}
            with _quiet():
                try:
                    with torch.device("meta"):
                        self._sketch = backbones.create(self.name, features_only=True, **params)
                except (NotImplementedError, RuntimeError):  # some cannot be built without numbers
                    self._sketch = backbones.create(self.name, features_only=True, **params)
        return self._sketch

    def takes_mixers(self) -> bool:
        """Whether it has token mixers that can be replaced."""
        if self.own or "attention" in registry.parameters_of(self.name.removeprefix("timm:").partition(".")[0]):
            return True
        network = getattr(self.sketch, "model", None)
        return network is not None and "mixer" in swap.takes(network)

    def build(self, wanted: Wanted, mixer: Any = None) -> nn.Module:
        """The pyramid of the maps ``wanted``, with ``channels`` and ``strides``.

        Raises:
            InputError: as :func:`backbones.create`; or a class of the user's gives no such thing.
        """
        arguments = self.arguments(mixer)
        infos: Any = getattr(getattr(self.sketch, "model", None), "feature_info", None)
        if infos and not {"out_indices", "out_strides"} & arguments.keys():
            strides = [info["reduction"] for info in (infos if isinstance(infos, list) else infos.info)]
            arguments["out_indices"] = sorted(set(wanted(strides)))
        encoder = backbones.create(features_only=True, **arguments)
        if not all(getattr(encoder, name, None) for name in ("channels", "strides")):
            raise InputError(
                f"backbone '{self.name}' does not say the channels and strides of its maps; give "
                f"{type(encoder).__name__} these two attributes, or timm's forward_intermediates and feature_info."
            )
        return encoder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the line that the registry logs for each network that it changes."""
    logger = logging.getLogger("backbones.registry")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before

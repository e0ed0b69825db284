"""A segmentation network for volumes from its configuration: by name, or a class of the user's own by its path."""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attention.parameters import check_parameters
from kernels.errors import InputError, nearest_name, unknown_name
from tasks.meningioma.networks.agunet import AGUNet
from tasks.meningioma.networks.choices import kind_of
from tasks.meningioma.networks.daunet import DAUNet
from tasks.meningioma.networks.hierarchical import Hierarchical
from tasks.meningioma.networks.peers import PEERS, MonaiNetwork
from tasks.meningioma.networks.volume import DEFAULT_SIZE, VolumeNetwork

OURS: dict[str, tuple[type[AGUNet] | type[DAUNet] | type[Hierarchical], dict[str, Any]]] = {
    "agunet": (AGUNet, {}),
    "unet3d": (AGUNet, {"gate": False, "input_pyramid": False, "deep_supervision": False}),
    "daunet": (DAUNet, {}),
    "dagunet": (DAUNet, {"guided": True}),
    "hierarchical": (Hierarchical, {}),
}
"""The class and the defaults of each network that is written here."""
_NOT_OPTIONS = ("in_channels", "classes", "size", "name")
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError)


def available_networks() -> list[str]:
    """Names for ``network=``, in alphabetical order."""
    return sorted([*OURS, *PEERS])


def build_network(
    settings: Mapping[str, Any],
    in_channels: int = 1,
    classes: int = 2,
    attention: Mapping[str, Any] | str | None = None,
    size: Sequence[int] | None = None,
) -> nn.Module:
    """A network with ``forward`` for the logits (B, K, D, H, W) of volumes and ``forward_levels`` for all levels.

    Args:
        settings: ``name`` and the network's parameters, as in ``conf/network``; the name may be a path
            ``package.module:Class`` to a class of the user's, which may state a ``multiple`` that sizes are padded to.
        in_channels: channels C of the volumes.
        classes: K, background included.
        attention: a module of the registry, ``name`` and parameters as in ``conf/attention``: a mixer goes to the
            bottleneck (in ``hierarchical`` to every stage), a gate on every skip. ``stages`` has one entry for each
            place: true for the module, false for what is there without it, or another module. A name that exists as
            both means the mixer; the network's own ``gate`` takes it as a gate.
        size: (D, H, W) in voxels of the volumes, which is checked at once.

    Raises:
        InputError: a name or a parameter is unknown, a value is impossible, the attention has no place in the network,
            or volumes of this size are too small.
    """
    params = {key: _plain(value) for key, value in settings.items() if key != "name"}
    name = str(settings.get("name") or "")
    size = None if size is None else tuple(int(side) for side in size)
    if ":" in name:
        _refuse_attention(attention, name)
        network: VolumeNetwork = _own_network(name, in_channels, classes, params, size)
    elif name.lower() in OURS:
        name = name.lower()
        cls, defaults = OURS[name]
        params = {**defaults, **params}
        _check(name, cls, params)
        params |= _placed(attention)
        try:
            network = cls(in_channels=in_channels, classes=classes, size=size or DEFAULT_SIZE, name=name, **params)
        except InputError as error:
            message = str(error)
            raise error if message.startswith("network") else InputError(f"network '{name}': {message}") from error
    elif name.lower() in PEERS:
        _refuse_attention(attention, name)
        network = MonaiNetwork(name.lower(), in_channels, classes, **params)
    else:
        raise _unknown(name)
    if size is not None:
        network.check_size(size)
    return network


def refuse_backbone(backbone: Any) -> None:
    """Say that ``backbone=`` has no place in a network for volumes, when one is asked for.

    Raises:
        InputError: ``backbone`` is not None.
    """
    if backbone is not None:
        called = backbone.get("name") if isinstance(backbone, Mapping) else backbone
        raise InputError(
            f"backbone={called} is for images of two axes and cannot encode volumes; choose network= from "
            f"{', '.join(available_networks())}, or network=hierarchical with +attention=MIXER."
        )


def _placed(attention: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Which argument of our networks an attention module is for."""
    if attention is None:
        return {}
    plain = _plain(attention)
    return {kind_of(plain): plain}


def _refuse_attention(attention: Any, name: str) -> None:
    if attention is not None:
        called = attention.get("name") if isinstance(attention, Mapping) else attention
        raise InputError(
            f"network '{name}' is used as it is and has no place for +attention={called}; these have: "
            f"{', '.join(sorted(OURS))}."
        )


def _check(name: str, cls: type[nn.Module], params: Mapping[str, Any]) -> None:
    accepted = [key for key in inspect.signature(cls).parameters if key not in _NOT_OPTIONS]
    for key in params:
        if key not in accepted:
            near = nearest_name(key, accepted)
            hint = f" Did you mean '{near}'?" if near else ""
            raise InputError(f"network '{name}' has no parameter '{key}'.{hint} It takes: {', '.join(accepted)}.")
    try:
        check_parameters(name, cls, params)
    except InputError as error:
        raise InputError(str(error).replace(f"attention '{name}'", f"network '{name}'", 1)) from None


def _unknown(name: str) -> InputError:
    import backbones

    if name in backbones.available():
        return InputError(
            f"network '{name}' is a backbone for images of two axes, which cannot encode volumes; choose from "
            f"{', '.join(available_networks())}, or network=hierarchical with +attention=MIXER."
        )
    return unknown_name(
        "network", name, available_networks(), "A class of your own is named by its path, package.module:Class."
    )


# ------------------------------------------------------------------------------------------- classes of the user's own


class OwnNetwork(VolumeNetwork):
    """A network of the user's behind the contract of ours; its ``forward_levels`` is used where it has one."""

    def __init__(self, name: str, network: nn.Module, in_channels: int, classes: int, multiple: int) -> None:
        super().__init__(name, in_channels, classes, multiple, smallest=1)
        self.network = network

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        run: Callable[[Tensor], Any] = self.network
        if not finest_only and hasattr(self.network, "forward_levels"):
            run = self.network.forward_levels  # type: ignore[assignment]
        try:
            out = run(x)
        except torch.OutOfMemoryError:
            raise
        except _BUILD_ERRORS as error:
            raise InputError(
                f"network '{self.name}' does not take a volume {tuple(x.shape)} ({_reason(error)}); if its sizes must "
                f"be multiples, say of which: network.multiple (now {self.multiple[0]})."
            ) from error
        levels = list(out) if isinstance(out, list | tuple) else [out]
        wanted = (len(x), self.classes, *x.shape[2:])
        found = tuple(getattr(levels[0], "shape", ())) if levels else ()
        if found != wanted:
            raise InputError(
                f"network '{self.name}' gives {found or type(out).__name__} for a volume {tuple(x.shape)}; logits "
                f"{wanted} are needed."
            )
        return levels


def _own_network(
    path: str, in_channels: int, classes: int, params: dict[str, Any], size: tuple[int, ...] | None
) -> VolumeNetwork:
    cls = _own_class(path)
    multiple = params.pop("multiple", 1)
    if not isinstance(multiple, int) or isinstance(multiple, bool) or multiple < 1:
        raise InputError(f"network '{path}': multiple={multiple!r} must be a whole number, at least 1.")
    offers: dict[str, Any] = {"in_channels": in_channels, "spatial_dims": 3}
    offers |= dict.fromkeys(("classes", "num_classes", "out_channels"), classes)
    offers |= {} if size is None else dict.fromkeys(("size", "img_size"), size)
    accepted = inspect.signature(cls).parameters
    given = {key: value for key, value in offers.items() if key in accepted} | params
    try:
        network = cls(**given)
    except InputError:
        raise
    except _BUILD_ERRORS as error:
        raise InputError(f"network '{path}' cannot be built from {sorted(given)} ({_reason(error)}).") from error
    if isinstance(network, VolumeNetwork):
        return network
    return OwnNetwork(path, network, in_channels, classes, multiple)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _own_class(path: str) -> type[nn.Module]:
    module, _, called = path.partition(":")
    try:
        cls = operator.attrgetter(called)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"network '{path}' cannot be imported ({error}); the form is package.module:Class and the package must be "
            "importable from where the command runs."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputError(f"network '{path}' is no class of networks (torch.nn.Module).")
    return cls


def _plain(value: Any) -> Any:
    """Configuration objects as lists and dictionaries."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value

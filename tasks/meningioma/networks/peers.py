"""Networks of MONAI as they are, by name, with defaults for T1-weighted heads at voxels of about 1 mm.

Cardoso et al., MONAI: an open-source framework for deep learning in healthcare, 2022, arXiv 2211.02701. MONAI is
imported when one of these is built. What their sizes have to be divisible by is met by padding inside.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernels.errors import InputError, nearest_name
from tasks.meningioma.networks.volume import VolumeNetwork

_OURS = ("spatial_dims", "in_channels", "out_channels")
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError)


@dataclass(frozen=True)
class Peer:
    """One of MONAI's networks.

    Attributes:
        cls: its class in ``monai.networks.nets``.
        multiple: what its sizes have to be divisible by, from the parameters it is built with.
        defaults: parameters, where MONAI has no default or one that is too small for heads.
    """

    cls: str
    multiple: Callable[[Mapping[str, Any]], int | Sequence[int]]
    defaults: Mapping[str, Any]


def _strides(params: Mapping[str, Any]) -> tuple[int, ...]:
    """The product of the strides along each axis.

    Raises:
        InputError: there is not one stride between each two levels, where the levels are given by their channels.
    """
    levels = params.get("channels")
    if levels is not None and len(params["strides"]) != len(levels) - 1:
        raise InputError(
            f"channels={list(levels)} and strides={list(params['strides'])}: there must be one stride less than levels."
        )
    steps = [(s,) * 3 if isinstance(s, int) else tuple(s) for s in params["strides"]]
    return tuple(math.prod(step[axis] for step in steps) for axis in range(3))


def _halvings(params: Mapping[str, Any]) -> int:
    return 2 ** (len(params["blocks_down"]) - 1)


PEERS: dict[str, Peer] = {
    "unet": Peer(
        "UNet",
        _strides,
        {"channels": (32, 64, 128, 256, 512), "strides": (2, 2, 2, 2), "num_res_units": 2, "norm": "instance"},
    ),
    "attention_unet": Peer(
        "AttentionUnet", _strides, {"channels": (16, 32, 64, 128, 256), "strides": (2, 2, 2, 2), "dropout": 0.0}
    ),
    "swin_unetr": Peer("SwinUNETR", lambda params: 32, {"feature_size": 24, "use_checkpoint": False}),
    "segresnet": Peer(
        "SegResNet", _halvings, {"init_filters": 16, "blocks_down": (1, 2, 2, 4), "blocks_up": (1, 1, 1)}
    ),
    "segresnet_ds": Peer(
        "SegResNetDS", _halvings, {"init_filters": 16, "blocks_down": (1, 2, 2, 4), "norm": "instance", "dsdepth": 3}
    ),
    "dynunet": Peer(
        "DynUNet",
        _strides,
        {
            "kernel_size": (3, 3, 3, 3, 3),
            "strides": (1, 2, 2, 2, 2),
            "upsample_kernel_size": (2, 2, 2, 2),
            "filters": (32, 64, 128, 256, 320),
            "deep_supervision": True,
            "deep_supr_num": 3,
        },
    ),
}


class MonaiNetwork(VolumeNetwork):
    """A network of MONAI behind the contract of ours: volumes (B, C, D, H, W) to logits (B, K, D, H, W).

    Those that supervise several levels (DynUNet, SegResNetDS) give each at its own size, finest first.

    Args:
        name: of :data:`PEERS`.
        in_channels: channels C of the volume.
        classes: K, background included.
        params: of MONAI's class, over the defaults here.

    Raises:
        InputError: MONAI's class does not take a parameter, or refuses its value.
    """

    def __init__(self, name: str, in_channels: int = 1, classes: int = 2, **params: Any) -> None:
        from monai.networks import nets

        peer = PEERS[name]
        cls = getattr(nets, peer.cls)
        given = {key: _tuples(value) for key, value in {**peer.defaults, **params}.items()}
        _check_names(name, cls, given)
        try:
            multiple = peer.multiple(given)
            super().__init__(name, in_channels, classes, multiple)
            self.network = cls(spatial_dims=3, in_channels=in_channels, out_channels=classes, **given)
        except InputError as error:
            message = str(error)
            raise error if message.startswith("network") else InputError(f"network '{name}': {message}") from error
        except _BUILD_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise InputError(f"network '{name}': MONAI's {peer.cls} cannot be built so ({reason}).") from error

    def levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        if len(x) == 0:  # which instance normalisation does not take
            return [level[:0] for level in self.levels(x.new_zeros(1, *x.shape[1:]), finest_only)]
        if hasattr(self.network, "heads"):
            return self._dynunet_levels(x, finest_only)
        if hasattr(self.network, "dsdepth") and self.network.training == finest_only:
            return self._segresnet_levels(x, finest_only)
        out = self.network(x)
        return list(out) if isinstance(out, list | tuple) else [out]

    def _dynunet_levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        """MONAI resizes the levels to the finest and stacks them; here they keep the sizes they are computed at."""
        network: Any = self.network
        finest = network.output_block(network.skip_layers(x))
        if not network.deep_supervision:
            return [finest]
        coarser = list(network.heads)
        # The network keeps its last maps, which would be held in memory and could not be copied.
        network.heads[:] = [torch.empty(0) for _ in coarser]
        return [finest] if finest_only else [finest, *coarser]

    def _segresnet_levels(self, x: Tensor, finest_only: bool) -> list[Tensor]:
        """What this network gives depends on whether it is training alone; only that flag is lent, not its layers'."""
        network = self.network
        training = network.training
        network.training = not finest_only
        try:
            out = network(x)
        finally:
            network.training = training
        return list(out) if isinstance(out, list) else [out]


def _check_names(name: str, cls: type[nn.Module], params: Mapping[str, Any]) -> None:
    accepted = [key for key in inspect.signature(cls).parameters if key not in _OURS]
    for key in params:
        if key not in accepted:
            near = nearest_name(key, accepted)
            hint = f" Did you mean '{near}'?" if near else ""
            raise InputError(f"network '{name}' has no parameter '{key}'.{hint} It takes: {', '.join(accepted)}.")


def _tuples(value: Any) -> Any:
    """Lists as tuples, which some of MONAI's checks ask for."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

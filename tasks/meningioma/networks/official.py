"""The published Keras weights of AGUNet and DAUNet, read from their HDF5 files into the networks here.

Such a file has a group for each layer, either at the top or below ``model_weights``, with kernels (D, H, W, in, out),
those of transposed convolutions (D, H, W, out, in). Layers have no names of their own: Keras numbers those of a kind
as they are made (``conv3d``, ``conv3d_1``, ...), and the networks here register theirs in the same order. Nothing but
arrays and strings is read from the file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attention.dual_position_channel import ChannelAttention, PositionAttention
from kernels.errors import InputError
from tasks.meningioma.networks.blocks import UpConv

_log = logging.getLogger(__name__)

KINDS = {
    "convolution": "convolutions",
    "up-convolution": "transposed convolutions",
    "normalisation": "batch normalisations",
    "position": "position attentions",
    "channel": "channel attentions",
}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_NAMES = {"kernel": "weight", **_NORM}
_TOLD = 5


@dataclass(frozen=True)
class KerasLayer:
    """A layer of the file: its name, and its arrays by the name of the weight."""

    name: str
    kind: str
    arrays: Mapping[str, np.ndarray]


def load_keras(network: nn.Module, path: str | Path) -> nn.Module:
    """Load a Keras weights file into an AGUNet, DAUNet or DAGUNet, in place, and return it.

    What the file cannot hold stays as it is and is named in one line of the log: released files lack the projections of
    DAUNet's position attention.

    Raises:
        InputError: the file is no Keras weights file, or its layers are not those of the network; one message lists
            what differs.
    """
    path = Path(path)
    state = convert(network, read_layers(path), path.name)
    absent = [key for key in network.state_dict() if key not in state and not key.endswith("num_batches_tracked")]
    network.load_state_dict(state, strict=False)
    if absent:
        _log.warning(
            "%s: the file has no %s; they keep the values they were started with, so train before relying on them",
            path.name,
            ", ".join(absent),
        )
    return network


def read_layers(path: Path) -> list[KerasLayer]:
    """The layers of a file that have weights, in the file's order.

    Raises:
        InputError: the file is missing, damaged, or was not written by Keras in the HDF5 layout.
    """
    import h5py

    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist; give the HDF5 file of the released network.")
    try:
        with h5py.File(path, "r") as file:
            group = file.get("model_weights", file)
            classes = _classes(file.attrs.get("model_config"))
            found: dict[str, dict[str, np.ndarray]] = {}
            for layer in _strings(group.attrs, "layer_names"):
                for weight in _strings(group[layer].attrs, "weight_names"):
                    # A model inside a model has the weights of all its layers under one name.
                    owner, _, name = weight.rpartition("/")
                    owner = owner.rpartition("/")[2] or layer
                    found.setdefault(owner, {})[name.partition(":")[0]] = np.asarray(group[layer][weight])
    except (OSError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read as Keras weights ({_reason(error)}); an HDF5 file written by "
            "save_weights or by saving the whole model is needed."
        ) from error
    if not found:
        raise InputError(f"checkpoint {path} holds no layers with weights; was it written by Keras?")
    return [KerasLayer(name, _kind(name, arrays, classes.get(name, "")), arrays) for name, arrays in found.items()]


def convert(network: nn.Module, layers: list[KerasLayer], source: str) -> dict[str, Tensor]:
    """The state that ``layers`` are of ``network``, without what they do not have.

    Raises:
        InputError: numbers of layers or shapes differ, or a layer is of an unknown kind.
    """
    state: dict[str, Tensor] = {}
    faults = [f"layer {layer.name} with {', '.join(sorted(layer.arrays))}" for layer in layers if not layer.kind]
    ours = _modules(network)
    for kind, called in KINDS.items():
        theirs = sorted((layer for layer in layers if layer.kind == kind), key=lambda layer: _number(layer.name))
        if len(theirs) != len(ours[kind]):
            faults.append(f"{len(theirs)} {called} where the network has {len(ours[kind])}")
            continue
        for layer, (prefix, module) in zip(theirs, ours[kind], strict=True):
            found, differing = _tensors(layer, prefix, module)
            state |= found
            faults += differing
    if faults:
        told = "; ".join(faults[:_TOLD]) + (f"; and {len(faults) - _TOLD} more" if len(faults) > _TOLD else "")
        filters = getattr(getattr(network, "encoder", None), "filters", None)
        built = f" with filters={list(filters)}" if filters else ""
        raise InputError(
            f"checkpoint {source} does not fit network '{getattr(network, 'name', type(network).__name__)}'{built} "
            f"({told}); set filters, input_pyramid and deep_supervision as it was trained."
        )
    return state


def _modules(network: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """The modules of each kind in the order in which they are registered, which is that of the released code."""
    found: dict[str, list[tuple[str, nn.Module]]] = {kind: [] for kind in KINDS}
    for prefix, module in network.named_modules():
        if isinstance(module, UpConv):
            found["up-convolution"].append((prefix, module))
        elif isinstance(module, nn.Conv3d | nn.Conv1d):
            found["convolution"].append((prefix, module))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found["normalisation"].append((prefix, module))
        elif isinstance(module, PositionAttention):
            found["position"].append((prefix, module))
        elif isinstance(module, ChannelAttention):
            found["channel"].append((prefix, module))
    return found


def _tensors(layer: KerasLayer, prefix: str, module: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The state of ``module`` that a layer holds, and what does not fit."""
    own = module.state_dict()
    found: dict[str, Tensor] = {}
    faults = []
    for name, array in layer.arrays.items():
        key = name if name in own else _NAMES[name]
        target = own[key]
        given = array.transpose(4, 3, 0, 1, 2) if name == "kernel" and array.ndim == 5 else array
        shape = given.shape
        if target.dim() == 3 and shape[2:] == (1, 1, 1):
            shape = shape[:3]  # the gate treats places as a sequence, so its convolutions have one axis
        if shape != tuple(target.shape):
            faults.append(f"{layer.name}/{name} {shape} instead of {tuple(target.shape)} for {prefix}.{key}")
            continue
        tensor = torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32)).reshape(shape)
        found[f"{prefix}.{key}"] = tensor.to(target.dtype)
    return found, faults


def _kind(name: str, arrays: Mapping[str, np.ndarray], cls: str) -> str:
    """What a layer is; empty for one that neither network has."""
    weights, called = set(arrays), (cls or name).lower()
    if weights == set(_NORM):
        return "normalisation"
    if weights == {"kernel", "bias"}:
        return "up-convolution" if "transpose" in called else "convolution"
    if weights == {"gamma"}:
        return "channel" if called.startswith("cam") else "position" if called.startswith("pam") else ""
    return ""


def _number(name: str) -> int:
    """``conv3d`` is Keras's first, ``conv3d_1`` its second."""
    number = re.search(r"_(\d+)$", name)
    return int(number[1]) if number else 0


def _strings(attributes: Any, name: str) -> list[str]:
    """A list of names; Keras splits one that is longer than HDF5 allows for an attribute, and numbers the parts."""
    parts = [name] if name in attributes else []
    while f"{name}{len(parts)}" in attributes:
        parts.append(f"{name}{len(parts)}")
    if not parts:
        raise KeyError(f"there is no attribute {name}")
    return [item.decode() if isinstance(item, bytes) else str(item) for part in parts for item in attributes[part]]


def _reason(error: Exception) -> str:
    return (str(error).strip("'\" ") or type(error).__name__).splitlines()[0].rstrip(".")


def _classes(config: Any) -> dict[str, str]:
    """The class of each layer by its name, from the description that a whole saved model has."""
    if config is None:
        return {}
    found: dict[str, str] = {}
    open_ = [json.loads(config)]
    while open_:
        item = open_.pop()
        if isinstance(item, dict):
            settings = item.get("config")
            if isinstance(item.get("class_name"), str) and isinstance(settings, dict):
                found[str(settings.get("name", item.get("name", "")))] = item["class_name"]
            open_ += item.values()
        elif isinstance(item, list):
            open_ += item
    return found

"""Weights from a file or the model hub's cache into a backbone: found, read without unpickling, checked whole."""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.official_names import to_timm
from backbones.pathology import ENCODERS, PathologyEncoder
from backbones.weights import innermost
from kernels.errors import InputError

State = dict[str, Tensor]
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_USUAL_NAMES = ("model.safetensors", "pytorch_model.bin")


def find_file(path: str | Path) -> Path:
    """The weights file at ``path``: the file itself, or the one that lies in the folder.

    Raises:
        InputError: nothing is there, or a folder holds several and none has the usual name.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"backbone.checkpoint={path} does not exist; give a weights file or a folder that holds one.")
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and not file.name.startswith("."))
    usual = [file for name in _USUAL_NAMES for file in found if file.name == name]
    if usual or len(found) == 1:
        return (usual or found)[0]
    held = ", ".join(file.name for file in found[:5]) or f"no {', '.join(_SUFFIXES)} file"
    raise InputError(f"backbone.checkpoint={path} is a folder that holds {held}; name one weights file.")


def read_state(path: Path) -> State:
    """The state dict in a safetensors or PyTorch file, out of any wrapper and without a ``module.`` prefix.

    Raises:
        InputError: the file cannot be read, would have to run code, or holds no tensors by name.
    """
    try:
        content: Any
        if path.suffix == ".safetensors":
            import safetensors.torch

            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"backbone.checkpoint={path} is no plain weights file (it is damaged or holds Python objects, which are "
            "never run here); save its state dict alone, best as safetensors."
        ) from error
    except Exception as error:  # each format has its own exceptions for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"backbone.checkpoint={path} cannot be read as weights ({reason}).") from error
    held = innermost(content).items() if isinstance(content, Mapping) else ()
    state = {str(key): value for key, value in held if isinstance(value, Tensor)}
    if not state:
        raise InputError(f"backbone.checkpoint={path} holds no named tensors; a state dict is needed.")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def load(model: nn.Module, state: Mapping[str, Tensor], name: str, source: str) -> None:
    """Put ``state`` into ``model`` after the renaming its architecture defines; every parameter must be there and fit.

    A classifier in the file is left out when the model has none, and so are later stages when the model gives feature
    maps only.

    Raises:
        InputError: parameters are missing, left over, or of another shape; the message names ``name`` and ``source``.
    """
    target, is_part = _inner_model(model)
    renamed = _rename(target, dict(state), name)
    own = target.state_dict()
    shapes = [
        f"{key} {tuple(renamed[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & renamed.keys())
        if renamed[key].shape != own[key].shape
    ]
    faults = [("shape", shapes)]
    if not shapes:
        # PyTorch supplies the counters that old files of batch normalisation lack, so its own answer is asked.
        result = target.load_state_dict(renamed, strict=False)
        faults = [("missing", result.missing_keys), ("unexpected", [] if is_part else result.unexpected_keys)]
    told = [
        f"{label}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for label, keys in faults
        if keys
    ]
    if told:
        raise InputError(f"{source} does not fit backbone '{name}' ({'; '.join(told)}); is it of another model?")


def digest(path: Path) -> str:
    """The first 12 hexadecimal digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def state_digest(model: nn.Module) -> str:
    """The first 12 hexadecimal digits of the SHA-256 over names and values of the model's state."""
    found = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def load_from_hub(model: nn.Module, encoder: PathologyEncoder) -> str:
    """Load the published weights of ``encoder``, from the local cache of the hub or by downloading them; say which.

    Raises:
        InputError: they are not there and cannot be downloaded; the message says what to request and where.
    """
    hub_id, path = hub_file(encoder)
    load(model, read_state(path), encoder.name, f"{hub_id} ({path.name})")
    # Files in the cache lie under snapshots/<commit>/.
    commit = path.parent.name[:12] if path.parent.parent.name == "snapshots" else digest(path)
    return f"pretrained: {hub_id}@{commit}"


def hub_file(encoder: PathologyEncoder) -> tuple[str, Path]:
    """Hub id and local path of the weights of ``encoder``, downloaded only when no source is in the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    for hub_id, file_name in encoder.sources:
        cached = try_to_load_from_cache(hub_id, file_name)
        if isinstance(cached, str):
            return hub_id, Path(cached)
    failure: Exception | None = None
    for hub_id, file_name in encoder.sources:
        try:
            return hub_id, Path(hf_hub_download(hub_id, file_name))
        except Exception as error:  # whatever the network, the hub or the disk raises
            failure = failure or error
    reason = str(failure).strip().splitlines()[0].rstrip(".")[:160] or type(failure).__name__
    page = f"https://huggingface.co/{encoder.hub_id}"
    access = f"request access at {page} and log in with 'hf auth login'" if encoder.gated else f"see {page}"
    raise InputError(
        f"backbone '{encoder.name}': its weights are not in the local hub cache and could not be downloaded "
        f"({reason}); {access}, or download {encoder.sources[0][1]} there yourself and give backbone.checkpoint=FILE."
    ) from failure


def _inner_model(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module that carries the checkpoint's names, and whether it is only a part of the network."""
    from timm.models._features import FeatureDictNet, FeatureGetterNet

    if isinstance(model, FeatureGetterNet):
        return model.model, True
    return model, isinstance(model, FeatureDictNet)


def _rename(model: nn.Module, state: State, name: str) -> State:
    encoder = ENCODERS.get(name)
    if encoder is not None:
        from backbones.architectures import checkpoint_filter

        state = checkpoint_filter(encoder, state, model)
    own = model.state_dict().keys()
    filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    converted = encoder is not None and encoder.architecture.startswith("fovea_")  # the filter above did all
    if not converted and state.keys() != own:
        state = filter_fn(state, model) if filter_fn is not None else to_timm(state)
    spare = [key for key in state if key not in own and key.startswith(_classifier_prefixes(model))]
    return {key: value for key, value in state.items() if key not in spare}


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ("head", "fc", "classifier")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))

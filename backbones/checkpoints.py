"""Weights from a file or the model hub's cache into a backbone: found, read without unpickling, checked whole."""

from __future__ import annotations

import hashlib
import pickle
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models._features import FeatureDictNet, FeatureGetterNet
from timm.models.crossvit import CrossVit
from timm.models.davit import DaVit
from timm.models.gcvit import GlobalContextVit
from torch import Tensor, nn

from backbones.freezing import is_level_norm
from backbones.official_names import to_timm
from backbones.pathology import ENCODERS, PathologyEncoder
from backbones.positions import resample
from backbones.pyramid import Pyramid
from backbones.weights import innermost
from kernels.errors import InputError

State = dict[str, Tensor]
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_USUAL_NAMES = ("model.safetensors", "pytorch_model.bin")
# Where a backbone lies in a pyramid of ours, and in detectors and segmenters.
_PARTS = ("backbone.", "pyramid.", "body.model.")
_LEVEL_NORM = re.compile(r"^(?:norm|extra_norms?\.)(\d)\.")
_TOLD = 10
# timm's networks whose authors' names are not timm's.
_RENAMED = (CrossVit, DaVit, GlobalContextVit)


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
    renamed = converted(target, dict(state), name)
    own = target.state_dict()
    shapes = [
        _spoken_shape(key, renamed[key], own[key])
        for key in sorted(own.keys() & renamed.keys())
        if renamed[key].shape != own[key].shape
    ]
    faults = [("shape", shapes)]
    if not shapes:
        # PyTorch supplies the counters that old files of batch normalisation lack, so its own answer is asked.
        result = target.load_state_dict(renamed, strict=False)
        missing = [key for key in result.missing_keys if not (is_part and is_level_norm(f"model.{_owner(key)}"))]
        faults = [("missing", missing), ("unexpected", [] if is_part else result.unexpected_keys)]
    _refuse(faults, name, source)
    if isinstance(model, Pyramid):
        _load_extras(model, state, name, source)


def _load_extras(model: nn.Module, state: Mapping[str, Tensor], name: str, source: str) -> None:
    """What a pyramid has besides its network, as far as it is in ``state``."""
    extra = {key: value for key, value in model.state_dict().items() if not key.startswith("body.")}
    found = _extras(state, extra.keys())
    wrong = [_spoken_shape(key, v, extra[key]) for key, v in found.items() if v.shape != extra[key].shape]
    _refuse([("shape", wrong)], name, source)
    model.load_state_dict(found, strict=False)


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def _refuse(faults: Sequence[tuple[str, Sequence[str]]], name: str, source: str) -> None:
    """All that does not fit in one message; nothing when all does."""
    told = [
        f"{label}: {', '.join(keys[:_TOLD])}" + (f" and {len(keys) - _TOLD} more" if len(keys) > _TOLD else "")
        for label, keys in faults
        if keys
    ]
    if told:
        raise InputError(f"{source} does not fit backbone '{name}' ({'; '.join(told)}); is it of another model?")


def _spoken_shape(key: str, given: Tensor, wanted: Tensor) -> str:
    return f"{key} {tuple(given.shape)} instead of {tuple(wanted.shape)}"


@dataclass
class Started:
    """What :meth:`Weights.start` did: tensors of the network by name, and why one that is needed would not fit.

    Attributes:
        tensors: all that the network had, kept so that their identities stay theirs.
        missing: names of those that the file has not.
        shapes: names of those of another shape, with the sentence's part for each.
    """

    tensors: dict[str, Tensor]
    missing: list[str]
    shapes: dict[str, str]


@dataclass(frozen=True)
class Weights:
    """Weights of a file for a backbone that is being built.

    The file is safetensors or PyTorch's (read without running code): a state dict of timm's or the authors' names, out
    of any wrapper, that of a detector or segmenter whose backbone it is (``backbone.``), or of a
    :class:`backbones.pyramid.Pyramid`. Positions are resampled where sizes changed. A classifier of other classes, a
    last norm and norms of the levels may be missing where only feature maps are asked for.
    """

    state: State
    source: str

    @classmethod
    def read(cls, path: str | Path) -> Weights:
        """Those at ``path``, a file or a folder that holds one.

        Raises:
            InputError: as :func:`find_file` and :func:`read_state`.
        """
        file = find_file(path)
        return cls(read_state(file), f"backbone.checkpoint={file}")

    def start(self, model: nn.Module, name: str) -> Started:
        """Load what fits into the whole network, before anything in it is replaced or taken off."""
        renamed = converted(model, dict(self.state), name)
        own = model.state_dict(keep_vars=True)
        shapes = {
            k: _spoken_shape(k, renamed[k], v) for k, v in own.items() if k in renamed and renamed[k].shape != v.shape
        }
        fitting = {key: value for key, value in renamed.items() if key in own and key not in shapes}
        result = model.load_state_dict(fitting, strict=False)
        return Started(dict(own), [key for key in result.missing_keys if key not in shapes], shapes)

    def finish(self, model: nn.Module, name: str, started: Started) -> None:
        """Check that all the finished network still has of its tensors was in the file, and load what came since.

        Raises:
            InputError: tensors are missing or of another shape; one message names them all.
        """
        inner, is_part = _inner_model(model)
        left = {id(tensor) for tensor in inner.state_dict(keep_vars=True).values()}
        needed = {key for key, tensor in started.tensors.items() if id(tensor) in left}
        missing = [
            key for key in started.missing if key in needed and not (is_part and is_level_norm(f"model.{_owner(key)}"))
        ]
        shapes = [said for key, said in started.shapes.items() if key in needed]
        if missing or shapes or len(left) > len(needed):
            # Weights of a network that was already changed in this way have everything by its new names.
            renamed = converted(inner, dict(self.state), name)
            own = inner.state_dict()
            if all(key in renamed and renamed[key].shape == value.shape for key, value in own.items()):
                inner.load_state_dict(renamed, strict=False)
                missing, shapes = [], []
        _refuse([("shape", shapes), ("missing", missing)], name, self.source)
        if is_part:
            _load_extras(model, self.state, name, self.source)
        else:
            spare = converted(inner, dict(self.state), name).keys() - inner.state_dict().keys()
            _refuse([("unexpected", sorted(spare))], name, self.source)


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
    if isinstance(model, FeatureGetterNet | Pyramid):
        return model.model, True
    return model, isinstance(model, FeatureDictNet)


def converted(model: nn.Module, state: State, name: str) -> State:
    """``state`` by the names and sizes of ``model``, without a classifier that it has not."""
    encoder = ENCODERS.get(name)
    if encoder is not None:
        from backbones.architectures import checkpoint_filter

        state = checkpoint_filter(encoder, state, model)
    own = model.state_dict()
    state = _of_part(state, own)
    done = encoder is not None and encoder.architecture.startswith("fovea_")  # the filter above did all
    if not done and not fits(state, own):
        filter_fn = _filter_of(type(model))
        if isinstance(model, _RENAMED):
            state = to_timm(state)
        state = resample(state, model)  # before the filters, of which timm's warn over how they index a table
        if filter_fn is not None:
            state = filter_fn(state, model)
        state = {_LEVEL_NORM.sub(r"level_norms.\1.", key) if key not in own else key: v for key, v in state.items()}
        state = resample(state, model)
    spare = [key for key in state if key not in own and key.startswith(_classifier_prefixes(model))]
    spare += [key for key in state if key not in own and is_level_norm(f"model.{_owner(key)}")]
    return {key: value for key, value in state.items() if key not in spare}


def fits(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether names and shapes are the same."""
    return state.keys() == own.keys() and all(state[key].shape == own[key].shape for key in own)


def _of_part(state: State, own: Mapping[str, Tensor]) -> State:
    """The backbone alone, out of a pyramid of ours or of a detector or segmenter."""
    for prefix in _PARTS:
        if any(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _extras(state: Mapping[str, Tensor], wanted: Iterable[str]) -> State:
    """What a pyramid has besides its network, by its names."""
    renamed = {}
    for key, value in state.items():
        for prefix in _PARTS:
            key = key.removeprefix(prefix)
        renamed[_LEVEL_NORM.sub(r"level_norms.\1.", key)] = value
    wanted = set(wanted)
    return {key: value for key, value in renamed.items() if key in wanted}


def _filter_of(kind: type[nn.Module]) -> Callable[[State, nn.Module], State] | None:
    """The filter that stands beside the network's class, or beside the one it is derived from."""
    for base in kind.__mro__:
        found = getattr(sys.modules.get(base.__module__), "checkpoint_filter_fn", None)
        if found is not None:
            return found
    return None


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("classifier") or ("head", "fc", "classifier")
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))

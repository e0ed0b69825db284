"""Backbones by name: timm's registry with our models in it, hub ids, and dotted paths to a user's own class."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.models._features import FeatureGetterNet
from torch import nn

import backbones.ours  # noqa: F401  (registers our models with timm)
from attention.registry import available as known
from backbones import swap
from backbones.choices import HostKind, kinds_of, spoken
from kernels.errors import InputError

_log = logging.getLogger(__name__)
Change = Callable[[nn.Module], None]

HUB = "hf-hub:"
_HUB_PREFIXES = (HUB, "hf_hub:")
# What building a network raises for an argument it cannot use; timm's networks do not agree on one type.
_BUILD_ERRORS = (TypeError, ValueError, RuntimeError, AssertionError, KeyError, IndexError, AttributeError)


def available(pattern: str | None = None) -> list[str]:
    """See :func:`backbones.available`."""
    return sorted(timm.list_models(pattern or ""))


def create(
    name: str,
    pretrained: bool = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    attention: Any = None,
    **params: Any,
) -> nn.Module:
    """See :func:`backbones.create`."""
    if features_only:
        params["features_only"] = True
        if out_indices is not None:
            params["out_indices"] = tuple(out_indices)
    if is_dotted_path(name):
        return _create_own(name, pretrained, attention, params)
    model_name = resolve(name, pretrained)
    change: Change | None = None
    if attention is not None:
        accepted = parameters_of(model_name)
        if "gate" in accepted and kinds_of(attention) == ["gate"]:
            if params.get("gate") is not None:
                raise InputError(
                    f"backbone '{name}' is given gates twice, attention={spoken(attention)} and "
                    f"gate={spoken(params['gate'])}; leave one of them out."
                )
            params["gate"] = attention
        elif "attention" in accepted:
            params["attention"] = attention
        else:
            change = partial(_change, name, attention, kinds_of(attention), params.get("img_size"))
    if change is not None and features_only:
        # timm calls this when the weights are loaded, and would wrap the unchanged model.
        params["feature_cls"] = partial(_features, change)
    try:
        model = _build(model_name, pretrained, params)
        if change is not None and not features_only:
            change(model)
        return model
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"backbone '{name}': its weights are not in the local hub cache and could not be downloaded "
            f"({_first_line(error)}); connect, or give backbone.checkpoint=FILE."
        ) from error
    except _BUILD_ERRORS as error:
        params.pop("feature_cls", None)
        given = f" with {', '.join(f'{k}={v!r}' for k, v in params.items())}" if params else ""
        raise InputError(f"backbone '{name}' cannot be built{given} ({_first_line(error)}).") from error


def parameters_of(model_name: str) -> list[str]:
    """Names of the parameters that the model's builder names itself; what else it takes is its class's affair."""
    base = model_name.partition(".")[0]
    return list(inspect.signature(timm.model_entrypoint(base)).parameters) if timm.is_model(base) else []


def _build(model_name: str, pretrained: bool, params: dict[str, Any]) -> nn.Module:
    """The timm model; ``img_size`` is left out for networks that take any size and have no such parameter."""
    try:
        return timm.create_model(model_name, pretrained=pretrained, **params)
    except TypeError as error:
        if "img_size" not in params or "'img_size'" not in str(error):
            raise
        others = {key: value for key, value in params.items() if key != "img_size"}
        return timm.create_model(model_name, pretrained=pretrained, **others)


def _change(name: str, attention: Any, kinds: Sequence[HostKind], img_size: Any, model: nn.Module) -> None:
    """Put mixers or gates into ``model``, or say what would fit."""
    takes = swap.takes(model)
    kind = next((kind for kind in kinds if kind in takes), None)
    if kind is None:
        kind = kinds[0]
        fits = [f"it takes {other}s: {', '.join(known(other))}" for other in takes]
        families = {"mixer": swap.FAMILIES, "gate": swap.GATED_FAMILIES}[kind]
        where = {"mixer": "token mixer that can be replaced", "gate": "stages that gates can follow"}[kind]
        raise InputError(
            f"backbone '{name}' has no {where}, so the {kind} attention='{spoken(attention)}' does not apply; "
            f"{'; '.join([*fits, f'{kind}s go with {families}'])}."
        )
    if kind == "mixer":
        done = swap.replace_attention(model, attention, img_size=img_size)
    else:
        done = swap.add_gates(model, attention)
    _log.info("backbone '%s' with attention '%s': %s", name, spoken(attention), done)


def _features(
    change: Change, model: nn.Module, out_indices: int | tuple[int, ...] = (0, 1, 2, 3), **_: Any
) -> FeatureGetterNet:
    """The changed model as a module that gives NCHW feature maps."""
    change(model)
    return FeatureGetterNet(model, out_indices=out_indices)


def resolve(name: str, pretrained: bool) -> str:
    """The name under which timm knows the backbone; a hub id becomes its cached folder when nothing may be downloaded.

    Raises:
        InputError: timm has no such model or tag, or the hub's description is needed and not cached.
    """
    if name.startswith(_HUB_PREFIXES):
        return _resolve_hub(name[len(HUB) :], pretrained)
    bare = name.removeprefix("timm:").removeprefix("timm/")
    base, _, tag = bare.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base.lower(), available(), n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        raise InputError(
            f"backbone '{name}' is not known.{hint} List the {len(available())} known names with "
            "python -c \"import backbones; print(*backbones.available('res*'))\"; hf-hub:ORG/NAME and "
            "package.module:Class are accepted too."
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"backbone '{name}': '{base}' has no weights tagged '{tag}'; its tags are: {', '.join(tags) or 'none'}."
        )
    return bare


def is_dotted_path(name: str) -> bool:
    """Whether the name is of the form ``package.module:Class``."""
    return ":" in name and not name.startswith((*_HUB_PREFIXES, "timm:"))


def _resolve_hub(hub_id: str, pretrained: bool) -> str:
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, "config.json")
    if isinstance(cached, str):
        if "architecture" not in json.loads(Path(cached).read_text(encoding="utf-8")):
            raise InputError(f"backbone '{HUB}{hub_id}' is no timm model: its config.json names no architecture.")
        if not pretrained:
            return f"local-dir:{Path(cached).parent}"
    elif not pretrained:
        raise InputError(
            f"backbone '{HUB}{hub_id}' is not in the local hub cache and nothing is downloaded without "
            "backbone.pretrained=true; set it, or name the timm model that the hub page gives."
        )
    return f"{HUB}{hub_id}"


def _create_own(path: str, pretrained: bool, attention: Any, params: dict[str, Any]) -> nn.Module:
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"backbone '{path}' cannot be imported ({_first_line(error)}); the form is package.module:Class and the "
            "package must be importable from where the command runs."
        ) from error
    if pretrained:
        params["pretrained"] = True
    if attention is not None:
        params["attention"] = attention
    try:
        model = cls(**params)
    except _BUILD_ERRORS as error:
        given = ", ".join(f"{k}={v!r}" for k, v in params.items())
        raise InputError(f"backbone '{path}' cannot be built with ({given}) ({_first_line(error)}).") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"backbone '{path}' gave a {type(model).__name__}; a torch.nn.Module is needed.")
    return model


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]

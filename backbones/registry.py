"""Backbones by name: timm's registry with our models in it, hub ids, and dotted paths to a user's own class."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from torch import nn

import backbones.architectures
import backbones.dense
import backbones.dynamic_perceiver
import backbones.meta_spikformer  # noqa: F401  (these register our models with timm)
from kernels.errors import InputError

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
    attention: str | nn.Module | type[nn.Module] | Mapping[str, Any] | None = None,
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
    if attention is not None:
        if "attention" not in inspect.signature(timm.model_entrypoint(model_name)).parameters:
            raise InputError(
                f"backbone '{name}' has no token mixer that can be replaced, so attention='{_spoken(attention)}' does "
                "not apply; leave attention out or choose a backbone whose blocks take one."
            )
        params["attention"] = attention
    try:
        return timm.create_model(model_name, pretrained=pretrained, **params)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"backbone '{name}': its weights are not in the local hub cache and could not be downloaded "
            f"({_first_line(error)}); connect, or give backbone.checkpoint=FILE."
        ) from error
    except _BUILD_ERRORS as error:
        given = f" with {', '.join(f'{k}={v!r}' for k, v in params.items())}" if params else ""
        raise InputError(f"backbone '{name}' cannot be built{given} ({_first_line(error)}).") from error


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


def _spoken(attention: Any) -> str:
    return attention if isinstance(attention, str) else getattr(attention, "name", type(attention).__name__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]

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
from torch import nn

import backbones.ours  # noqa: F401  (registers our models with timm)
from attention.registry import available as known
from backbones import swap
from backbones.checkpoints import Weights
from backbones.choices import HostKind, kinds_of, spoken
from backbones.lora import add_lora
from backbones.pyramid import Pyramid
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
    *,
    out_strides: Sequence[int] | None = None,
    level_norms: bool = False,
    frozen_stages: int = -1,
    norm_eval: bool = False,
    checkpoint: str | Path | None = None,
    lora: Any = None,
    **params: Any,
) -> nn.Module:
    """See :func:`backbones.create`."""
    dense = {"out_strides": out_strides, "level_norms": level_norms, "frozen_stages": frozen_stages}
    dense |= {"norm_eval": norm_eval}
    _check(name, pretrained, features_only, checkpoint, dense)
    weights = None if checkpoint is None else Weights.read(checkpoint)
    if is_dotted_path(name):
        model = _create_own(name, pretrained, features_only, out_indices, attention, dense, params)
        if weights is not None:
            weights.finish(model, name, weights.start(model, name))
    else:
        model = _create_known(name, pretrained, features_only, out_indices, attention, dense, weights, params)
    if lora is not None:
        add_lora(model, lora)
    return model


def _create_known(
    name: str,
    pretrained: bool,
    features_only: bool,
    out_indices: Sequence[int] | None,
    attention: Any,
    dense: dict[str, Any],
    weights: Weights | None,
    params: dict[str, Any],
) -> nn.Module:
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

    def finish(model: nn.Module, indices: int | Sequence[int] | None = None) -> nn.Module:
        """The built network with everything that was asked for."""
        started = None if weights is None else weights.start(model, name)
        if change is not None:
            change(model)
        if features_only:
            asked: int | Sequence[int] | None = out_indices
            if out_indices is None and dense["out_strides"] is None:
                asked = _within(indices, model)
            model = _pyramid(model, name, asked, dense)
        if weights is not None and started is not None:
            weights.finish(model, name, started)
        return model

    given = dict(params)
    optional = ["img_size"]
    if not features_only and dense["level_norms"]:
        given["level_norms"] = True  # a parameter of some of our own networks, which says so itself elsewhere
    if features_only:
        # timm calls this when published weights are loaded; what is left out of its parameters is for its own wrappers.
        given |= {"features_only": True, "feature_cls": lambda model, out_indices=None, **_: finish(model, out_indices)}
        if _takes_any_size(model_name):
            given = {"dynamic_img_size": True, **given}
        if dense["level_norms"] and _is_ours(model_name):
            given = {"level_norms": True, **given}
        optional += ["dynamic_img_size", "level_norms"]
    try:
        try:
            model = _build(model_name, pretrained, given, optional)
        except TypeError as error:
            if "'feature_cls'" not in str(error):  # a few of timm's builders know no wrapper but their own
                raise
            return finish(_build(model_name, pretrained, params, optional))
        return model if features_only else finish(model)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"backbone '{name}': its weights are not in the local hub cache and could not be downloaded "
            f"({_first_line(error)}); connect, or give backbone.checkpoint=FILE."
        ) from error
    except _BUILD_ERRORS as error:
        told = params | ({"features_only": True} if features_only else {})
        told |= {} if out_indices is None else {"out_indices": out_indices}
        spelled = f" with {', '.join(f'{k}={v!r}' for k, v in told.items())}" if told else ""
        raise InputError(f"backbone '{name}' cannot be built{spelled} ({_first_line(error)}).") from error


def _check(
    name: str, pretrained: bool, features_only: bool, checkpoint: str | Path | None, dense: dict[str, Any]
) -> None:
    if pretrained and checkpoint is not None:
        raise InputError(
            f"backbone '{name}' is asked for both pretrained=true and checkpoint={checkpoint}; choose one of them."
        )
    plain = {"out_strides": None, "frozen_stages": -1, "norm_eval": False}
    needless = [f"{key}={value}" for key, value in dense.items() if key in plain and value != plain[key]]
    if needless and not features_only:
        raise InputError(f"backbone '{name}': {', '.join(needless)} is for feature maps; give features_only=true too.")


def parameters_of(model_name: str) -> list[str]:
    """Names of the parameters that the model's builder names itself; what else it takes is its class's affair."""
    base = model_name.partition(".")[0]
    return list(inspect.signature(timm.model_entrypoint(base)).parameters) if timm.is_model(base) else []


_DYNAMIC = {"vision_transformer", "vision_transformer_hybrid", "deit", "eva"}
_DYNAMIC |= {"swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr"}


def _build(model_name: str, pretrained: bool, params: dict[str, Any], optional: Sequence[str]) -> nn.Module:
    """The timm model; parameters that are ``optional`` are left out for networks that have no such thing."""
    try:
        return timm.create_model(model_name, pretrained=pretrained, **params)
    except TypeError as error:
        unknown = next((key for key in optional if key in params and f"'{key}'" in str(error)), None)
        if unknown is None:
            raise
        others = {key: value for key, value in params.items() if key != unknown}
        return _build(model_name, pretrained, others, optional)


def _takes_any_size(model_name: str) -> bool:
    """Whether the network may have the parameter that makes it take images of any size."""
    module = _module_of(model_name)
    return module is None or module.rpartition(".")[2] in _DYNAMIC | {"architectures"}


def _is_ours(model_name: str) -> bool:
    module = _module_of(model_name)
    return module is not None and module.startswith("backbones.")


def _module_of(model_name: str) -> str | None:
    """Where the builder of a network is defined; None for networks of the hub."""
    base = model_name.partition(".")[0]
    return timm.model_entrypoint(base).__module__ if timm.is_model(base) else None


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


def _create_own(
    path: str,
    pretrained: bool,
    features_only: bool,
    out_indices: Sequence[int] | None,
    attention: Any,
    dense: dict[str, Any],
    params: dict[str, Any],
) -> nn.Module:
    """A class of the user's; one that keeps to timm's conventions becomes a pyramid as every other backbone."""
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"backbone '{path}' cannot be imported ({_first_line(error)}); the form is package.module:Class and the "
            "package must be importable from where the command runs."
        ) from error
    given = dict(params)
    wraps = features_only and hasattr(cls, "forward_intermediates")
    if pretrained:
        given["pretrained"] = True
    if attention is not None:
        given["attention"] = attention
    if features_only and not wraps:
        given["features_only"] = True
        if out_indices is not None:
            given["out_indices"] = tuple(out_indices)
    try:
        model = cls(**given)
    except _BUILD_ERRORS as error:
        told = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise InputError(f"backbone '{path}' cannot be built with ({told}) ({_first_line(error)}).") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"backbone '{path}' gave a {type(model).__name__}; a torch.nn.Module is needed.")
    return _pyramid(model, path, out_indices, dense) if wraps else model


def _within(indices: int | Sequence[int] | None, model: nn.Module) -> int | Sequence[int] | None:
    """timm's choice of maps, of a network that may have been given fewer layers than that counts on."""
    levels = len(getattr(model, "feature_info", None) or ())
    if indices is None or isinstance(indices, int):
        return indices if indices is None else min(indices, levels)
    return [i for i in indices if -levels <= i < levels] or None


def _pyramid(model: nn.Module, name: str, indices: int | Sequence[int] | None, dense: dict[str, Any]) -> Pyramid:
    try:
        return Pyramid(model, indices, **dense)
    except InputError as error:
        raise InputError(f"backbone '{name}': {error}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:200]

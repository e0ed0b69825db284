"""The registry of attention modules: names, kinds, creation, official checkpoints.

A module registers itself with ``@register("name", kind="pooling")`` in a file of this folder, and a YAML file of the
same name in ``conf/attention`` holds its defaults; nothing else is edited. A method that exists as several kinds has
one name and a class for each. Files are found and imported at the first look-up, so that importing this package stays
free of torch.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from kernels.errors import InputError, nearest_name, unknown_name

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["mixer", "gate", "pooling", "cross"]
_Module = TypeVar("_Module", bound=type)

_classes: dict[str, dict[Kind, type[nn.Module]]] = {}
_discovered = False


def register(name: str, kind: Kind) -> Callable[[_Module], _Module]:
    """Class decorator: make the module available as ``name``.

    The class may define ``checkpoint_filter(state) -> state``, a static method that renames an official state dict to
    this module's own parameters (see :func:`load_official`).
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} of attention {name!r} must be one of {get_args(Kind)}")

    def add(cls: _Module) -> _Module:
        kinds = _classes.setdefault(name, {})
        previous = kinds.get(kind, cls)
        if f"{previous.__module__}.{previous.__qualname__}" != f"{cls.__module__}.{cls.__qualname__}":
            raise ValueError(
                f"{kind} attention {name!r} is registered twice: {previous.__module__} and {cls.__module__}"
            )
        cls.kind = kind  # type: ignore[attr-defined]
        cls.name = name  # type: ignore[attr-defined]
        kinds[kind] = cls
        return cls

    return add


def available(kind: Kind | None = None) -> list[str]:
    """Registered names in alphabetical order, of one kind when given."""
    _discover()
    return sorted(name for name, kinds in _classes.items() if kind is None or kind in kinds)


def create(name: str, *, kind: Kind | None = None, **params: Any) -> nn.Module:
    """Build the module called ``name``, or the class at the dotted path ``package.module:Class``.

    ``kind`` is what the caller can use; a module of another kind is refused with the list of what fits. Without it, a
    name that exists as several kinds means the first of them in the order mixer, gate, pooling, cross.

    Raises:
        InputError: unknown name, wrong kind, or a parameter the module does not take.
    """
    cls = class_of(name, kind)
    accepted = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for param in params:
            if param not in accepted:
                near = nearest_name(param, accepted)
                hint = f" Did you mean '{near}'?" if near else ""
                raise InputError(
                    f"attention '{name}' has no parameter '{param}'.{hint} It takes: {', '.join(accepted)}."
                )
    return cls(**params)


def kinds_of(name: str) -> list[Kind]:
    """The kinds of a registered name or dotted path, in the order mixer, gate, pooling, cross."""
    if ":" in name:
        return [_kind(_from_dotted_path(name))]
    kinds = _lookup(name)
    return [kind for kind in get_args(Kind) if kind in kinds]


def class_of(name: str, kind: Kind | None = None) -> type[nn.Module]:
    """The class that :func:`create` builds.

    Raises:
        InputError: unknown name or wrong kind.
    """
    found = kinds_of(name)
    if kind is not None and kind not in found:
        raise InputError(
            f"attention '{name}' is of kind '{' and '.join(found)}' and a '{kind}' module is needed here; "
            f"those that fit: {', '.join(available(kind))}."
        )
    return _from_dotted_path(name) if ":" in name else _lookup(name)[kind or found[0]]


def parameters_of(name: str, kind: Kind | None = None) -> list[str]:
    """Names of the parameters that :func:`create` takes for a registered name or dotted path."""
    return list(inspect.signature(class_of(name, kind)).parameters)


def describe(name: str, kind: Kind | None = None) -> str:
    """First line of the module's docstring."""
    return (inspect.getdoc(class_of(name, kind)) or "").partition("\n")[0]


def load_official(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Load the state dict of the paper's released code into ``module`` (in place) and return it.

    The module's ``checkpoint_filter`` renames the keys; a state dict of ours passes through unchanged.

    Raises:
        InputError: keys missing, unexpected, or of another shape after the renaming.
    """
    rename = getattr(module, "checkpoint_filter", None)
    own = module.state_dict()
    ours = own.keys() == state.keys() and all(own[key].shape == value.shape for key, value in state.items())
    renamed = dict(state) if rename is None or ours else rename(dict(state))
    missing = sorted(own.keys() - renamed.keys())
    unexpected = sorted(renamed.keys() - own.keys())
    shapes = [
        f"{key} {tuple(renamed[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & renamed.keys())
        if renamed[key].shape != own[key].shape
    ]
    faults = [
        f"{label}: {', '.join(items[:5])}" + (f" and {len(items) - 5} more" if len(items) > 5 else "")
        for label, items in (("missing", missing), ("unexpected", unexpected), ("shape", shapes))
        if items
    ]
    if faults:
        raise InputError(f"the checkpoint does not fit {type(module).__name__}: {'; '.join(faults)}.")
    module.load_state_dict(renamed)
    return module


def _lookup(name: str) -> dict[Kind, type[nn.Module]]:
    _discover()
    found = _classes.get(name.lower())
    if found is None:
        raise unknown_name(
            "attention", name, _classes, "A class of your own is named by its path, package.module:Class."
        )
    return found


def _from_dotted_path(path: str) -> type[nn.Module]:
    module_name, _, class_name = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"attention '{path}' cannot be imported ({error}); the form is package.module:Class and the package "
            "must be importable from where the command runs."
        ) from error
    if getattr(cls, "kind", None) not in get_args(Kind):
        raise InputError(
            f"attention '{path}' has no class attribute 'kind'; set it to one of {', '.join(get_args(Kind))}."
        )
    return cast("type[nn.Module]", cls)


def _kind(cls: type[nn.Module]) -> Kind:
    return cast(Kind, getattr(cls, "kind"))  # noqa: B009 (set by register)


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    import attention

    for info in pkgutil.iter_modules(attention.__path__):
        if info.name not in ("__main__", "bench", "registry"):
            importlib.import_module(f"attention.{info.name}")
    _discovered = True

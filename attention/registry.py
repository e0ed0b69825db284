"""The registry of attention modules: names, kinds, creation, official checkpoints.

A module registers itself with ``@register("name", kind="pooling")`` in a file of this folder, and a YAML file of the
same name in ``conf/attention`` holds its defaults; nothing else is edited. A method that exists as several kinds has
one name and a class for each. Files are found and imported at the first look-up, so that importing this package stays
free of torch.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

from attention.parameters import check_parameters
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
    if name != name.lower() or ":" in name:
        raise ValueError(f"attention {name!r} must be in lower case, without a colon: other names are never found")

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


def create(name: str | type[nn.Module], *, kind: Kind | None = None, **params: Any) -> nn.Module:
    """Build the module called ``name``, the class at the dotted path ``package.module:Class``, or a class itself.

    ``kind`` is what the caller can use; a module of another kind is refused with the list of what fits. Without it, a
    name that exists as several kinds means the first of them in the order mixer, gate, pooling, cross.

    Raises:
        InputError: unknown name, wrong kind, a parameter the module does not take, or a value that cannot be.
    """
    cls = class_of(name, kind)
    return build(cls, name if isinstance(name, str) else name_of(cls), params)


def build(cls: type[nn.Module], name: str, params: Mapping[str, Any]) -> nn.Module:
    """Build a class that is called ``name`` in messages.

    Raises:
        InputError: a parameter the class does not take, or a value that cannot be.
    """
    accepted = inspect.signature(cls).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for param in params:
            if param not in accepted:
                near = nearest_name(param, accepted)
                hint = f" Did you mean '{near}'?" if near else ""
                raise InputError(
                    f"attention '{name}' has no parameter '{param}'.{hint} It takes: {', '.join(accepted)}."
                )
    check_parameters(name, cls, params)
    return cls(**params)


def build_in_block(
    cls: type[nn.Module], name: str, index: int, *, dim: int, offers: Mapping[str, Any], params: Mapping[str, Any]
) -> nn.Module:
    """Build a class for block ``index`` of a stage: a paper may alternate between forms from block to block.

    Args:
        offers: what the host knows, such as ``num_heads`` and ``input_size``; passed where the class takes it and
            ``params`` leave it open.

    Raises:
        InputError: as :func:`build`.
    """
    accepted = inspect.signature(cls).parameters
    given = {"dim": dim, **{key: value for key, value in offers.items() if key in accepted}, **params}
    for_block = getattr(cls, "for_block", None)
    if for_block is None or given.keys() - accepted.keys():
        return build(cls, name, given)
    check_parameters(name, cls, params)
    # What a class does with a block's number may hang on a parameter that was left at its default.
    defaults = {key: p.default for key, p in accepted.items() if p.default is not p.empty}
    return build(cls, name, for_block({**defaults, **given}, index))


def kinds_of(name: str | type[nn.Module]) -> list[Kind]:
    """The kinds of a registered name, dotted path or class, in the order mixer, gate, pooling, cross."""
    if not isinstance(name, str | type):
        raise InputError(f"attention takes a name, package.module:Class or a class; got {name!r}.")
    if isinstance(name, type) or ":" in name:
        return [cast(Kind, getattr(_own(name), "kind"))]  # noqa: B009 (no class of torch has it)
    kinds = _lookup(name)
    return [kind for kind in get_args(Kind) if kind in kinds]


def class_of(name: str | type[nn.Module], kind: Kind | None = None) -> type[nn.Module]:
    """The class that :func:`create` builds.

    Raises:
        InputError: unknown name or wrong kind.
    """
    found = kinds_of(name)
    if kind is not None and kind not in found:
        called = name if isinstance(name, str) else name_of(name)
        raise InputError(
            f"attention '{called}' is of kind '{' and '.join(found)}' and a '{kind}' module is needed here; "
            f"those that fit: {', '.join(available(kind))}."
        )
    return _own(name) if isinstance(name, type) or ":" in name else _lookup(name)[kind or found[0]]


def name_of(cls: type[nn.Module]) -> str:
    """What a class is called in messages: its registered name, or its own."""
    return getattr(cls, "name", "") or cls.__name__


def parameters_of(name: str | type[nn.Module], kind: Kind | None = None) -> list[str]:
    """Names of the parameters that :func:`create` takes for a registered name, dotted path or class."""
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


def _own(path: str | type[nn.Module]) -> type[nn.Module]:
    """A class of the user's, given by its path or itself."""
    cls: Any = path
    if isinstance(path, str):
        module_name, _, class_name = path.partition(":")
        try:
            cls = operator.attrgetter(class_name)(importlib.import_module(module_name))
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise InputError(
                f"attention '{path}' cannot be imported ({error}); the form is package.module:Class and the package "
                "must be importable from where the command runs."
            ) from error
    if not isinstance(cls, type):
        raise InputError(f"attention '{path}' is no class; the form is package.module:Class.")
    path = path if isinstance(path, str) else f"{cls.__module__}:{cls.__qualname__}"
    if getattr(cls, "kind", None) not in get_args(Kind):
        raise InputError(
            f"attention '{path}' has no class attribute 'kind'; set it to one of {', '.join(get_args(Kind))}."
        )
    return cast("type[nn.Module]", cls)


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    import attention

    for info in pkgutil.iter_modules(attention.__path__):
        if info.name not in ("__main__", "bench", "registry"):
            importlib.import_module(f"attention.{info.name}")
    _discovered = True

"""Registering operators with ``torch.library``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def custom_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: register a function as ``torch.ops.fovea.<name>``, opaque to ``torch.compile``.

    The body runs with autocast off: the public function has already chosen the dtypes, and scores must not fall back to
    half precision within. It must return fresh contiguous tensors, no inputs or views of them.
    """

    def register(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def body(*args: Any, **kwargs: Any) -> Any:
            device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
            with torch.autocast(device, enabled=False):
                return function(*args, **kwargs)

        schema = torch.library.infer_schema(function, mutates_args=())
        return torch.library.custom_op(f"fovea::{name}", body, mutates_args=(), schema=schema)

    return register


def autocasting(tensor: Tensor) -> bool:
    """Whether autocast is on for the tensor's device; never for one without autocast, such as ``meta``."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def precisely(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast off for the tensor's device, where it has autocast: what is computed keeps the dtype it is given in."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device where autocast is on, else as they are."""
    if not autocasting(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) for t in tensors)

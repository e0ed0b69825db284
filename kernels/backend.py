"""Which implementation of an operator runs, and why.

Every operator has up to three: ``triton`` (NVIDIA GPUs from Ampere on), ``torch`` (any device, the fast path of the
CPU) and ``reference`` (plain PyTorch, the definition of correct, slow). ``auto`` takes Triton where it can serve and
``torch`` elsewhere. A call's ``backend=``, else the process's (:func:`configure`, :func:`using`, the environment
variable ``FOVEA_KERNELS``), forces one; one that cannot serve is refused with the reason, never replaced in silence.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.errors import InputError, unknown_name

Backend = Literal["auto", "triton", "torch", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The function of each operator that tells its choice; it takes the operator's own arguments.
OPERATORS = {
    "neighborhood_attention": "kernels.neighborhood_attention:plan",
    "neighborhood_qk": "kernels.dynamic_conv:plan_qk",
    "neighborhood_av": "kernels.dynamic_conv:plan_av",
    "bi_level_routing_attention": "kernels.bi_level_routing_attention:plan",
    "window_attention": "kernels.window_attention:plan",
    "gated_attention_pool": "kernels.gated_attention_pool:plan",
    "varlen_attention": "kernels.varlen_attention:plan",
    "linear_attention_2pass": "kernels.linear_attention:plan",
    "dynamic_conv": "kernels.dynamic_conv:plan",
    "outlook": "kernels.dynamic_conv:plan_outlook",
    "group_attention": "kernels.group_attention:plan",
    "ms_deform_attn": "kernels.ms_deform_attn:plan",
}

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = 80
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Read once: Triton decides when a kernel's file is imported whether it will be interpreted.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
# Fused multiply-add is what the tolerances assume; Triton is about to change its default and warns while it is unset.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class Choice:
    """The implementation a call takes: ``backend`` is ``triton``, ``torch`` or ``reference``."""

    operator: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.backend}, because {self.reason}"


def explain(operator: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation ``operator`` would take for these arguments, and why; nothing is computed.

    Args:
        operator: its name or its public function; ``args`` and ``kwargs`` are the operator's own.

    Raises:
        InputError: the operator is not known, or a backend is forced that cannot serve.
    """
    name = operator if isinstance(operator, str) else operator.__name__
    if name not in OPERATORS:
        raise unknown_name("operator", name, OPERATORS)
    module, _, function = OPERATORS[name].partition(":")
    choice = getattr(importlib.import_module(module), function)(*args, **kwargs)
    assert isinstance(choice, Choice)
    return choice


def choose(
    operator: str,
    requested: str,
    tensors: Sequence[Tensor | None],
    triton_refusal: str | None = None,
    torch_is_faster: str | None = None,
) -> Choice:
    """Settle a call's backend; every operator's ``plan`` ends here.

    Args:
        requested: the call's ``backend=``.
        tensors: the floating-point tensors a kernel would read.
        triton_refusal: what of this call the operator's Triton path cannot do, as the end of "... because ...".
        torch_is_faster: why ``auto`` should not take Triton although it could serve.

    Raises:
        InputError: the backend is not known, or is forced and cannot serve.
    """
    if requested not in BACKENDS:
        raise unknown_name("backend", requested, BACKENDS)
    wanted, source = (requested, "of the call") if requested != "auto" else (_settings.backend, "of the process")
    if wanted in ("torch", "reference"):
        return Choice(operator, wanted, f"backend='{wanted}' {source} asks for it")
    if wanted == "auto" and torch.compiler.is_exporting():
        return Choice(
            operator, "reference", "the model is being exported, and the reference is made of standard operators"
        )
    problem = _triton_problem(tensors) or triton_refusal
    if wanted == "triton":
        if problem is not None:
            remedy = "backend='auto' or 'torch'" if requested != "auto" else "kernels=auto or FOVEA_KERNELS=auto"
            raise InputError(f"{operator}: backend 'triton' {source} cannot serve because {problem}; use {remedy}.")
        return Choice(operator, "triton", f"backend='triton' {source} asks for it")
    if problem is None and INTERPRETING:
        problem = "Triton kernels are interpreted in this process, which is slow"
    if problem is None:
        problem = torch_is_faster
    if problem is not None:
        return Choice(operator, "torch", problem)
    return Choice(operator, "triton", "the tensors are on a GPU that Triton serves")


# ------------------------------------------------------------------------------------------------ the process's setting


@dataclass
class _Settings:
    backend: str = "auto"
    autotune: bool = False


def _from_environment() -> _Settings:
    backend = os.environ.get("FOVEA_KERNELS", "auto")
    if backend not in BACKENDS:
        raise unknown_name("kernels.backend (FOVEA_KERNELS)", backend, BACKENDS)
    return _Settings(backend, os.environ.get("FOVEA_AUTOTUNE", "0") == "1")


_settings = _from_environment()


def configure(backend: str | None = None, autotune: bool | None = None) -> None:
    """Set the process's backend, and whether Triton kernels time their candidate configurations on first use.

    Raises:
        InputError: the backend is not known.
    """
    if backend is not None:
        if backend not in BACKENDS:
            raise unknown_name("backend", backend, BACKENDS)
        _settings.backend = backend
    if autotune is not None:
        _settings.autotune = autotune


@contextlib.contextmanager
def using(backend: str | None = None, autotune: bool | None = None) -> Iterator[None]:
    """:func:`configure` for the length of a ``with`` block.

    >>> with using(backend="torch"):
    ...     choose("varlen_attention", "auto", []).backend
    'torch'
    """
    before = (_settings.backend, _settings.autotune)
    configure(backend, autotune)
    try:
        yield
    finally:
        configure(*before)


def autotuning() -> bool:
    """Whether kernels time their configurations on first use."""
    return _settings.autotune


# ------------------------------------------------------------------------------------------------------ what Triton can


def _find_triton() -> str | None:
    """Why Triton cannot be used in this process at all, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux)"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # built from source
        return None
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TRITON:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    return None


TRITON_PROBLEM = _find_triton()


def _triton_problem(tensors: Sequence[Tensor | None]) -> str | None:
    """Why Triton cannot serve these tensors, whatever the operator; None when it can."""
    if TRITON_PROBLEM is not None:
        return TRITON_PROBLEM
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in TRITON_DTYPES:
            return f"Triton serves float32, float16 and bfloat16, not {str(tensor.dtype).removeprefix('torch.')}"
        kind = tensor.device.type
        if kind == "cpu" and not INTERPRETING:
            return "the tensors are on the CPU and Triton compiles for GPUs"
        if kind not in ("cpu", "cuda", "meta"):
            return f"Triton does not compile for '{kind}' devices"
        # The interpreter multiplies the raw bits of bfloat16 numbers and says nothing.
        if kind == "cpu" and tensor.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        if kind == "cuda" and not torch.compiler.is_compiling() and torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(tensor.device)
            if 10 * major + minor < OLDEST_CAPABILITY:
                return f"this GPU has compute capability {major}.{minor} and the kernels need 8.0"
    return None

"""What every operator must pass, as functions its tests call with their own inputs.

``call`` takes the tensors and gives a tensor or a tuple of them; options such as the backend are bound beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]

# Absolute errors against float64 for inputs of unit variance: outputs, gradients.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (2e-3, 1e-2), torch.bfloat16: (2e-2, 6e-2)}


def outputs_and_gradients(
    call: Call, tensors: Sequence[Tensor | None], cotangents: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Outputs, gradients of the floating-point ``tensors``, and the cotangents used (drawn when none are given)."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    outputs = call(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]
    tracked = [o for o in outputs if o.requires_grad]
    if cotangents is None:
        cotangents = [torch.randn_like(o, dtype=torch.float64) for o in tracked]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    # An output of -inf (the log-sum-exp of nothing) has no gradient to send back.
    arriving = [c.to(o).where(o.isfinite(), 0) for c, o in zip(cotangents, tracked, strict=True)]
    gradients = torch.autograd.grad(tracked, wanted, arriving, allow_unused=True)
    kept = [torch.zeros_like(w) if g is None else g for g, w in zip(gradients, wanted, strict=True)]
    return [o.detach() for o in outputs], kept, list(cotangents)


def assert_matches(
    call: Call,
    reference: Call,
    tensors: Sequence[Tensor | None],
    scale: float = 1.0,
) -> None:
    """Outputs and gradients of ``call`` are those of ``reference`` in float64, within ``TOLERANCE`` times ``scale``.

    The tolerance of a gradient grows with its largest entry: sums over many tokens are large.
    """
    precise = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    expected, expected_gradients, cotangents = outputs_and_gradients(reference, precise)
    got, gradients, _ = outputs_and_gradients(call, tensors, cotangents)
    dtype = next(t.dtype for t in tensors if t is not None and t.is_floating_point())
    forward, backward = TOLERANCE.get(dtype, (1e-9, 1e-9))
    assert len(got) == len(expected)
    for number, (ours, exact) in enumerate(zip(got, expected, strict=True)):
        assert ours.shape == exact.shape
        atol = scale * forward * _largest(exact)
        torch.testing.assert_close(
            ours.to(exact.dtype), exact, rtol=0, atol=atol, msg=lambda m, n=number: f"output {n}: {m}"
        )
    for number, (ours, exact) in enumerate(zip(gradients, expected_gradients, strict=True)):
        atol = scale * backward * _largest(exact)
        torch.testing.assert_close(
            ours.double(), exact, rtol=0, atol=atol, msg=lambda m, n=number: f"gradient {n}: {m}"
        )


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()] if values.is_floating_point() else values.new_zeros(0)
    return max(1.0, finite.abs().max().item() if finite.numel() else 1.0)


def assert_gradcheck(call: Call, tensors: Sequence[Tensor | None]) -> None:
    """Numerical gradients in float64; every output that has a gradient is checked."""
    leaves = [t.double().detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=0.0)


def assert_opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, fake tensors, autograd registration and AOT dispatch of a ``torch.ops.fovea`` operator."""
    with warnings.catch_warnings():  # its tester looks at .grad of tensors that are not leaves
        warnings.simplefilter("ignore")
        torch.library.opcheck(operator, arguments)


def assert_compiles(call: Call, tensors: Sequence[Tensor | None], tolerance: float = 1e-5) -> None:
    """``torch.compile(fullgraph=True)`` gives the eager outputs and gradients.

    The graph is captured, its derivative taken and both run (``aot_eager``); code generation is Inductor's own affair
    and takes a minute of C++ compiling on a CPU.
    """
    expected, expected_gradients, cotangents = outputs_and_gradients(call, tensors)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, gradients, _ = outputs_and_gradients(compiled, tensors, cotangents)
    for ours, eager in zip([*got, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(ours, eager, rtol=tolerance, atol=tolerance)


def assert_any_incoming_gradient(call: Call, tensors: Sequence[Tensor | None], tolerance: float = 1e-5) -> None:
    """An expanded cotangent (of ``sum``) and a transposed one give what a contiguous one gives."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]

    def first(*values: Any) -> Tensor:
        out = call(*values)
        return out if isinstance(out, Tensor) else out[0]

    out = first(*leaves)
    ones = torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True, allow_unused=True)
    expanded = torch.autograd.grad(out.sum(), wanted, retain_graph=True, allow_unused=True)
    dense = torch.randn_like(out)
    flipped = dense.flatten(0, -2).t().contiguous().t().view(out.shape) if out.dim() > 1 else dense
    plain = torch.autograd.grad(out, wanted, dense, retain_graph=True, allow_unused=True)
    strided = torch.autograd.grad(out, wanted, flipped, allow_unused=True)
    for ours, exact in zip([*expanded, *strided], [*ones, *plain], strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


def assert_runs_under_autocast(call: Call, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> None:
    """Float32 tensors under CPU autocast to ``dtype``: finite outputs near the float32 ones, float32 gradients."""
    exact, _, _ = outputs_and_gradients(call, tensors)
    with torch.autocast("cpu", dtype):
        got, gradients, _ = outputs_and_gradients(call, tensors)
    tolerance = 10 * TOLERANCE[dtype][0]
    for ours, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
    for gradient in gradients:
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


def poisoned(tensor: Tensor, value: float = torch.nan, margin: int = 3) -> Tensor:
    """The same values as a view into a larger buffer that is ``value`` everywhere else."""
    shape = [size + 2 * margin for size in tensor.shape[:-1]] + [tensor.shape[-1] + margin]
    buffer = torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(margin, margin + size) for size in tensor.shape[:-1])][..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view

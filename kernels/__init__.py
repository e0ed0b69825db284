"""Operators shared by every attention module: a reference, a fast path in PyTorch, a Triton path, and one call for all.

This package imports nothing when it is imported; name the operator's own module, as in
``from kernels.segment import segment_softmax``. ``kernels.explain("neighborhood_attention", q, k, v, kernel_size=7)``
says which implementation that call would take, and why; ``kernels.configure`` and ``kernels.using`` choose one.
"""


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    if name in ("configure", "explain", "using"):
        from kernels import backend

        return getattr(backend, name)
    raise AttributeError(f"module 'kernels' has no attribute '{name}'")

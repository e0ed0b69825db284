"""Operators shared by every attention module: a reference, a fast CPU path, and one call for both.

This package imports nothing when it is imported; name the operator's own module, as in
``from kernels.segment import segment_softmax``.
"""

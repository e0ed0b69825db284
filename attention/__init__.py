"""Attention modules by name: one file per module, one registry for all.

>>> import attention
>>> attention.available(kind="pooling")[:2]
['abmil', 'acmil']
"""

from attention.registry import (
    available,
    class_of,
    create,
    describe,
    kinds_of,
    load_official,
    parameters_of,
    register,
)

__all__ = ["available", "class_of", "create", "describe", "kinds_of", "load_official", "parameters_of", "register"]

"""Grids are cut out as blocks are, by copies."""

from tests.attention.released.block import released

__all__ = ["released"]

"""The two branches side by side, see the common part."""

from tests.attention.released._polarized import parallel as released

__all__ = ["released"]

"""The spatial branch after the channel branch, see the common part."""

from tests.attention.released._polarized import sequential as released

__all__ = ["released"]

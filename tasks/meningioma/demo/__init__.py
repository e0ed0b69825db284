"""The embedded demo: made heads with meningiomas, drawn on first use and kept outside the repository."""

from tasks.meningioma.demo.heads import make_heads

__all__ = ["make_heads"]

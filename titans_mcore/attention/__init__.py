"""Attention over a sliding window with a persistent prefix, behind one function."""

from .attend import attend, rotate

__all__ = ["attend", "rotate"]

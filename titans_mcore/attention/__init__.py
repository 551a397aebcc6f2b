"""Attention over a sliding window with a persistent prefix, behind one function."""

from .attend import attend
from .rotary import rotate

__all__ = ["attend", "rotate"]

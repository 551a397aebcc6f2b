"""The memory as one CPU operation in C++, compiled where it is used.

Reading order: operation.py holds the torch operators and their autograd formula, memory.cpp the computation; build.py
compiles it once for a machine.
"""

from ..memory.rule import VERSION
from .build import why_not_built
from .operation import Setting, go_on, scan

__all__ = ["VERSION", "Setting", "go_on", "scan", "why_not_built"]

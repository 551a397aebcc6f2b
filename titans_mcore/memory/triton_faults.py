"""Versions of Triton whose code is wrong on some GPUs, and what helps against it. Importing it needs no Triton."""

import importlib.metadata
import os
import re
import warnings
from functools import cache
from typing import NamedTuple

import torch

Version = tuple[int, ...]


class TritonFault(NamedTuple):
    """Code that is known to be wrong.

    Attributes:
        capability: Major compute capability of the GPUs.
        since: The first version of Triton that makes it.
        fixed: The first that no longer does.
        variable: Environment variable that avoids it where it is 1 while kernels are compiled; empty where none does.
        source: Where it was found.
    """

    capability: int
    since: str
    fixed: str
    variable: str
    source: str


# On Hopper the product of a transposed product, its operands in half precision, comes out wrong: gradients, not reads.
# Without wgmma, the instruction that takes an operand from registers of another layout, it is right.
FAULTS = (TritonFault(9, "3.4", "3.7.1", "DISABLE_MMA_V3", "fla-org/flash-linear-attention #640, #826, #983"),)


def fault_of(triton: Version, capability: int, faults: tuple[TritonFault, ...] = FAULTS) -> TritonFault | None:
    """What is wrong with half precision in this version on GPUs of this major compute capability; None for nothing."""
    for fault in faults:
        if fault.capability == capability and parsed_version(fault.since) <= triton < parsed_version(fault.fixed):
            return fault
    return None


@cache
def fault_here(device: torch.device) -> TritonFault | None:
    """What is wrong with the Triton that is installed on this device."""
    if device.type != "cuda":
        return None
    return fault_of(triton_version(), torch.cuda.get_device_capability(device)[0])


@cache
def avoid(fault: TritonFault) -> None:
    """Sets what helps against a fault, for all kernels that this process compiles from here on, and says so once.

    A value that the user has given stays: 0 leaves everything as it is.
    """
    value = os.environ.setdefault(fault.variable, "1")
    helps = "avoids that" if value == "1" else "would avoid that if it were 1"
    warnings.warn(
        f"Triton {dotted(triton_version())} makes wrong code for this GPU ({fault.source}); "
        f"{fault.variable}={value} {helps}, Triton {fault.fixed} or later needs no such thing",
        stacklevel=2,
    )


@cache
def triton_version() -> Version:
    """Of the package, under either of its names; empty where neither is installed."""
    return installed_version("triton") or installed_version("pytorch-triton")


def installed_version(package: str) -> Version:
    """Numbers of a package's version; empty where it is not installed."""
    try:
        return parsed_version(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return ()


def parsed_version(text: str) -> Version:
    """Three numbers of a version such as 3.6.0+git1234 or 3.7; one that comes before a release counts as just below it.

    3.7.1 is (3, 7, 1, 0) and 3.7.1rc1 (3, 7, 1, -1): nobody knows what that holds already.
    """
    found = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:\.\d+)*[-_.]?(a|b|c|rc|dev|alpha|beta|pre)?", text.lower())
    if found is None:
        return ()
    major, minor, patch, before = found.groups()
    return (int(major), int(minor or 0), int(patch or 0), -1 if before else 0)


def dotted(version: Version) -> str:
    """A version as text."""
    return ".".join(map(str, version[:3])) or "of no known version"

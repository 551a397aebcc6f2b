"""Compiles memory.cpp once, whichever process needs it first, and finds it there afterwards.

A library is named after all that it depends on, so nothing is ever rebuilt in place. Who compiles holds a lock of the
operating system, which ends with its process, and works in a folder of its own; a finished library is renamed into its
place. So a process that is killed in the middle leaves nothing behind that another one could wait for or load.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("memory.cpp")
FLAGS = ("-O3", "-Wno-psabi", "-Wno-unknown-pragmas", *(["-fopenmp"] if sys.platform == "linux" else []))
SWITCH = "TITANS_NATIVE"  # 0 in the environment does without, as where there is no compiler
_LAST_LINES = 6  # of what a compiler that fails has said


@cache
def library() -> ctypes.CDLL:
    """The compiled operation, built if it is not there.

    Raises:
        OSError: It cannot be built; the message ends with the compiler's last lines.
    """
    return ctypes.CDLL(str(built(library_file())))


@cache
def why_not_built() -> str:
    """Why there is no library, in a sentence; empty if there is one. A compiler that fails is quoted in a warning."""
    if os.environ.get(SWITCH) == "0":
        return f"the native memory is switched off by {SWITCH}=0"
    if os.name != "posix":
        return "the native memory is for Linux and macOS"
    compiler = os.environ.get("CXX", "c++")
    if not library_file().is_file() and shutil.which(shlex.split(compiler)[0]) is None:
        return f"the native memory needs a C++ compiler, and {compiler} was not found; install g++ or set CXX"
    try:
        library()
    except OSError as error:
        warnings.warn(f"memory: {error}", stacklevel=2)
        return str(error).partition("\n")[0]
    return ""


def library_file() -> Path:
    """Where the library of this source, these flags, this torch and this kind of processor belongs."""
    parts = (SOURCE.read_bytes(), FLAGS, torch.__version__, sys.version_info[:2], sys.platform, platform.machine())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "titans-mcore"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_folder) / f"memory-{digest}.so"


def built(file: Path, source: Path = SOURCE) -> Path:
    """`file`, compiled from a source if it is not there; one process does, and the others wait."""
    import fcntl  # a system without it has no native memory

    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.is_file():
            for left in file.parent.glob(f"{file.stem}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{file.stem}-", dir=file.parent) as folder:
                _compile(folder, source)
                os.replace(next(Path(folder).glob("*.so")), file)
    return file


def _compile(folder: str, source: Path) -> None:
    from torch.utils import cpp_extension

    # torch calls ninja, which lies beside the interpreter of an environment that nobody has activated.
    path = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = os.pathsep.join([path, sysconfig.get_path("scripts")])
    try:
        cpp_extension.load(
            "titans_memory",
            [str(source)],
            extra_cflags=list(FLAGS),
            extra_ldflags=[flag for flag in FLAGS if flag.startswith("-f")],
            build_directory=folder,
            is_python_module=False,
        )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        said = [line for line in str(error).splitlines() if line.strip()][-_LAST_LINES:]
        raise OSError("\n".join(["the native memory could not be compiled", *said])) from error
    finally:
        os.environ["PATH"] = path

"""The exported code: the package's own statements in few files, needing torch and transformers alone."""

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from titans_mcore.hf.flatten import ENTRIES, PACKAGE_FOLDER, flatten_code

ROOMS = {"memory": "titans_memory", "attention": "titans_attention", "mixers": "titans_mixers"}
PARTS = {
    "config.py": "configuration_titans",
    "decoding.py": "titans_mixers",
    "linear/__init__.py": "titans_mixers",  # without its oracle
    "linear/fla.py": "titans_mixers",
    "linear/handover.py": "titans_mixers",
    "linear/scan.py": "titans_mixers",
    "linear/selective.py": "titans_mixers",
    "linear/ttt.py": "titans_mixers",
    "hf/configuration_titans.py": "configuration_titans",
    "hf/modeling_titans.py": "modeling_titans",
    "hf/cache_titans.py": "titans_hf",
    "hf/padding_titans.py": "titans_hf",
    "hf/files_titans.py": "titans_hf",
}


def without_imports(source: str) -> str:
    """The lines that are no part of an import, inside a function too."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    guard = r"\s*(try:|except ImportError:|raise)?"
    return "\n".join(line for line in lines if not re.fullmatch(guard, line))


def statements(source: str) -> list[str]:
    """The text of every top-level statement but imports, docstrings and __all__."""
    tree, lines = ast.parse(source), source.splitlines()
    imports = ast.Import | ast.ImportFrom | ast.Try
    kept = [node for node in tree.body if not isinstance(node, imports) and "TYPE_CHECKING" not in ast.unparse(node)]
    kept = [node for node in kept if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    first = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in kept]
    texts = ["\n".join(lines[start - 1 : node.end_lineno]) for start, node in zip(first, kept, strict=True)]
    return [text for text in texts if not text.startswith("__all__")]


@pytest.mark.parametrize("entries", [ENTRIES, ("tasks_titans", "configuration_titans")])
def test_no_import_is_left_outside_torch_transformers_the_standard_library_and_siblings(
    entries: tuple[str, ...],
) -> None:
    code = flatten_code(entries=entries)
    for name, source in code.items():
        tree = ast.parse(source)
        guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, (name, ast.unparse(node))
                assert f"{node.module}.py" in code, (name, ast.unparse(node))
                assert f"{node.module}.py" != name, ast.unparse(node)
            elif isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                tops = {full.partition(".")[0] for full in names}
                assert tops <= {"torch", "transformers", *sys.stdlib_module_names}, (name, tops)


def test_every_statement_is_carried_line_by_line_in_order_and_nothing_else_is_there() -> None:
    code = flatten_code()
    files = {file: home for room, home in ROOMS.items() for file in (PACKAGE_FOLDER / room).glob("*.py")}
    files |= {PACKAGE_FOLDER / part: home for part, home in PARTS.items()}
    for home in {*files.values()}:
        exported = code[f"{home}.py"]
        found, carried = [without_imports(text) for text in statements(exported)], 0
        for file in [file for file in files if files[file] == home]:
            original = file.read_text()
            assert (ast.get_docstring(ast.parse(original)) or "").splitlines()[0] in exported, file
            texts = statements(original)
            places = [found.index(without_imports(text)) for text in texts]
            assert places == sorted(places), file
            for text in texts:
                assert text in exported or re.search(r"^ +(from|import) ", text, re.MULTILINE), (file, text)
            carried += len(texts)
        assert carried == len(found), home


def test_a_file_imports_a_name_at_its_top_once() -> None:
    for name, source in flatten_code().items():
        source = source.partition("# Every other file that this one needs")[0]
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
        taken = [(getattr(node, "module", None), alias.name) for node in nodes for alias in node.names]
        assert len(taken) == len(set(taken)), name


def test_the_code_is_the_same_at_every_export() -> None:
    assert flatten_code() == flatten_code()


@pytest.mark.parametrize("entry", ["modeling_titans", "tasks_titans"])
def test_each_entry_names_every_file_it_needs(entry: str) -> None:
    code = flatten_code(entries=(entry, "configuration_titans"))
    named = set(re.findall(r"^\s*from \.(\S+) import", code[f"{entry}.py"], re.MULTILINE))
    assert named == {name.removesuffix(".py") for name in code} - {entry}


Write = Callable[..., dict[str, str]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a package of these files, `memory__state="..."` for memory/state.py, and gives its exported code."""
    root = tmp_path / "pkg"

    def code(modeling: str = "", **files: str) -> dict[str, str]:
        given = {"hf__modeling_titans": modeling, "hf__configuration_titans": "", "config": "x = 1\n"}
        given |= {"memory____init__": "from .state import State\n", "memory__state": "State = int\n"}
        for name, source in (given | files).items():
            file = root / f"{name.replace('__', '/', 1)}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(source)
        return flatten_code(root)

    return code


@pytest.fixture
def load(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Writes a package, imports the exported code and gives its modeling_titans."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*modeling: str, **files: str) -> ModuleType:
        name = f"exported_{next(_COUNT)}"
        (tmp_path / name).mkdir()
        for file, source in write(*modeling, **files).items():
            (tmp_path / name / file).write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module(f"{name}.modeling_titans")

    return run


_COUNT = itertools.count()


@pytest.mark.parametrize(
    ("line", "top", "rest"),
    [
        ("from ..config import x", "from .configuration_titans import x", ""),
        ("from ..memory import State", "from .titans_memory import State", ""),
        ("from ..memory.state import State as S", "from .titans_memory import State as S", ""),
        ("from ..config import (\n    x,\n)", "from .configuration_titans import x", ""),
        ("def f():\n    from ..config import x", "", "def f():\n    from .configuration_titans import x"),
        ("import math", "import math", ""),
        ("import numpy as np", "try:\n    import numpy as np\nexcept ImportError:\n    raise", ""),
        (
            "if 1:\n    import triton",
            "",
            "if 1:\n    try:\n        import triton\n    except ImportError:\n        raise",
        ),
    ],
)
def test_imports_are_rewritten(write: Write, line: str, top: str, rest: str) -> None:
    source = write(f"a = 'from ..config import x'\n{line}\nb = 2\n")["modeling_titans.py"]
    header = "# ---- pkg/hf/modeling_titans.py ----\na = 'from ..config import x'\n"
    before, after = source.split(header)
    assert "\n".join(before.splitlines()[1:]).strip() == top
    assert after == f"{rest}\nb = 2\n".lstrip("\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from .. import config", "by its name"),
        ("from ..memory import state", "state is a module"),
        ("from ..missing import x", "no module ..missing"),
        ("from ...other import x", "inside the package"),
        ("from ..config import *", r"names instead of \*"),
        ("import pkg.config", "relatively"),
        ("import triton; x = 1", "line of its own"),
        ("if 1: import triton", "line of its own"),
        ("def f():\n    from ..memory import state", "state is a module"),
        ("x = __package__", "__package__ is another one"),
    ],
)
def test_an_import_that_cannot_be_followed_is_named(write: Write, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        write(line + "\n")
    assert "modeling_titans.py" in str(caught.value)


MEMORY = "from ..memory.first import a\nfrom ..memory.second import b\n"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("def _f(): pass", "def _f(): pass", "_f is pkg/memory/first.py:_f in the first and pkg/memory/second.py:_f"),
        ("from torch import Tensor as T", "T = 1", "T is torch.Tensor in the first and pkg/memory/second.py:T in the"),
        ("import re as r", "import math as r", "r is re in the first and math in the second"),
        ("from .state import State as S", "from ..config import x as S", "S is pkg/memory/state.py:State in the first"),
        ("def sum(x): pass", "def f(): return sum([])", "sum is pkg/memory/first.py:sum in the first and builtins.sum"),
        ("from __future__ import annotations", "", "different imports from __future__"),
        ("def f(State):\n    def g():\n        from .state import State", "", "variable here is called State too"),
        ("try:\n    from .state import State\nexcept ImportError:\n    pass", "", "import at the top or in a function"),
    ],
)
def test_what_one_file_cannot_mean_is_refused(write: Write, first: str, second: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write(MEMORY, memory__first=f"{first}\na = 1\n", memory__second=f"{second}\nb = 1\n")


def test_files_that_would_import_each_other_are_refused(write: Write) -> None:
    mixers = {"mixers____init__": "", "mixers__one": "from ..memory.second import b\na = 1\n"}
    memory = {"memory__first": "from ..mixers.one import a\n", "memory__second": "b = 1\n"}
    with pytest.raises(ValueError, match=r"titans_memory.py and titans_mixers.py would import each other"):
        write("from ..memory.first import a\n", **memory, **mixers)
    memory["memory__first"] = "def a():\n    from ..mixers.one import a\n"
    assert (
        "    from .titans_mixers import a\n"
        in write("from ..memory.first import a\n", **memory, **mixers)["titans_memory.py"]
    )


def test_a_package_that_only_a_late_module_needs_is_not_demanded_early(write: Write) -> None:
    late = {"memory__state": "def State():\n    from .late import x\n", "memory__late": "import triton\nx = 1\n"}
    with pytest.raises(ValueError, match=r"late.py: titans_memory.py is loaded where triton may be missing"):
        write("from ..memory import State\n", **late)


def test_the_code_runs_in_the_order_of_the_package(load: Callable[..., ModuleType]) -> None:
    """A registry whose modules fill it as they are imported, by name or as the folder is read."""
    files = {
        "mixers____init__": "from .base import R\nnames = list(R)\nfrom .late import L\nafter = list(R)\n"
        "for _ in globals().get('__path__', []):\n    raise ImportError\n__all__ = ['R']\n",
        "mixers__base": '"""Base."""\n\nR = {}\n\n\ndef put(f):\n    R[f.__name__] = f\n    return f\n',
        "mixers__late": "from . import R\nfrom .base import put as _p\n\n\n@_p\ndef L():\n    return R\n",
        "mixers__found": "from . import R\nfrom .base import put\n\n\n@put\ndef found():\n    return R\n",
    }
    module = load("from ..mixers import R, names, after\n", **files)
    assert (list(module.R), module.names, module.after) == (["L", "found"], [], ["L"])
    assert module.R["found"]() is module.R


def test_what_is_imported_later_is_there(load: Callable[..., ModuleType]) -> None:
    files = {
        "memory__first": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .second import B\n\n\n"
        'def a(x: "B"):\n    from .second import B as Other\n    from .second import C\n\n    return Other(), C, x\n'
        "def nothing():\n    from .second import B\n",
        "memory__second": "from .first import a\n\nB = dict\nC = 3\n",
    }
    module = load("from ..memory.first import a, nothing\n", **files)
    assert (module.a(1), module.nothing()) == (({}, 3, 1), None)

"""The exported code: the package's own files, importable as siblings, needing torch and transformers alone."""

import ast
import re
import sys
from pathlib import Path

import pytest

from titans_mcore.hf.flatten import PACKAGE_FOLDER, flat_name, flatten_code, rewrite_imports


def without_imports(source: str) -> list[str]:
    return [
        line for line in source.splitlines() if not re.match(r"\s*(from|import|try:|except ImportError|raise$)", line)
    ]


def test_no_import_is_left_outside_torch_transformers_the_standard_library_and_siblings() -> None:
    code = flatten_code()
    for name, source in code.items():
        tree = ast.parse(source)
        guarded = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, (name, ast.unparse(node))
                assert f"{node.module}.py" in code, (name, ast.unparse(node))
            elif isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in guarded:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                tops = {full.partition(".")[0] for full in names}
                assert tops <= {"torch", "transformers", *sys.stdlib_module_names}, (name, tops)


def test_the_mathematics_is_carried_line_by_line() -> None:
    code = flatten_code()
    for folder in ("memory", "attention", "mixers"):
        for file in (PACKAGE_FOLDER / folder).glob("*.py"):
            exported = code[f"{flat_name(file, PACKAGE_FOLDER)}.py"].splitlines()[1:]
            original = without_imports(file.read_text())
            assert without_imports("\n".join(exported)) == original, file


def test_the_code_is_the_same_at_every_export() -> None:
    assert flatten_code() == flatten_code()


def test_each_entry_names_every_file_it_needs() -> None:
    code = flatten_code()
    named = set(re.findall(r"^\s*from \.(\S+) import", code["modeling_titans.py"], re.MULTILINE))
    assert named == {name.removesuffix(".py") for name in code} - {"modeling_titans"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one module of each kind that imports may name."""
    root = tmp_path / "pkg"
    for folder in ("hf", "memory"):
        (root / folder).mkdir(parents=True)
    (root / "config.py").write_text("x = 1\n")
    (root / "memory" / "__init__.py").write_text("from .state import State\n")
    (root / "memory" / "state.py").write_text("State = int\n")
    return root


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from ..config import x", "from .titans_config import x"),
        ("from ..memory import State", "from .titans_memory import State"),
        ("from ..memory.state import State as S", "from .titans_memory_state import State as S"),
        ("from ..config import (\n    x,\n)", "from .titans_config import (\n    x,\n)"),
        ("def f():\n    from ..config import x", "def f():\n    from .titans_config import x"),
        ("import math", "import math"),
        ("if 1:\n    import triton", "if 1:\n    try:\n        import triton\n    except ImportError:\n        raise"),
    ],
)
def test_imports_are_rewritten(package: Path, line: str, expected: str) -> None:
    file = package / "hf" / "modeling_titans.py"
    file.write_text(f"a = 'from ..config import x'\n{line}\nb = 2\n")
    source, _ = rewrite_imports(file, package)
    assert source.splitlines()[1:] == f"a = 'from ..config import x'\n{expected}\nb = 2".splitlines()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from .. import config", "by its name"),
        ("from ..memory import state", "state is a module"),
        ("from ..missing import x", "no module ..missing"),
        ("from ...other import x", "inside the package"),
        ("import pkg.config", "relatively"),
        ("import triton; x = 1", "line of its own"),
    ],
)
def test_an_import_that_cannot_be_followed_is_named(package: Path, line: str, message: str) -> None:
    file = package / "hf" / "modeling_titans.py"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        rewrite_imports(file, package)
    with pytest.raises(ValueError, match=r"modeling_titans\.py, line 1"):
        rewrite_imports(file, package)


def test_two_files_of_one_name_are_an_error(package: Path) -> None:
    (package / "memory_state.py").write_text("")
    (package / "hf" / "configuration_titans.py").write_text("")
    (package / "hf" / "modeling_titans.py").write_text(
        "from ..memory.state import State\nfrom ..memory_state import y\n"
    )
    with pytest.raises(ValueError, match="both be exported as titans_memory_state"):
        flatten_code(package)

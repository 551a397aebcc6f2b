"""The package's own modelling files as siblings in one folder, which is all that transformers' loader follows.

A file keeps every line; only the module named by a relative import changes (`from ..memory.network import x` becomes
`from .titans_memory_network import x`). Files of this folder keep their names.
"""

import ast
import re
import sys
from pathlib import Path

PACKAGE_FOLDER = Path(__file__).parents[1]
ENTRIES = ("modeling_titans.py", "configuration_titans.py")
"""Files that an exported config.json names."""
_ALWAYS_THERE = {"torch", "transformers", *sys.stdlib_module_names}


def flatten_code(root: Path = PACKAGE_FOLDER) -> dict[str, str]:
    """Every file that the entries in `root`/hf need, them included: name in the exported folder to source.

    Raises:
        ValueError: An import cannot be followed, or two files would get one name; the message names it.
    """
    sources: dict[str, str] = {}
    origins: dict[str, Path] = {}
    waiting = [root / "hf" / entry for entry in ENTRIES]
    while waiting:
        file = waiting.pop()
        name = flat_name(file, root)
        if origins.setdefault(name, file) != file:
            raise ValueError(f"{origins[name]} and {file} would both be exported as {name}.py; rename one")
        if f"{name}.py" not in sources:
            sources[f"{name}.py"], needed = rewrite_imports(file, root)
            waiting += sorted(needed)
    for entry in ENTRIES:
        sources[entry] += _imports_of_rest(entry, sources)
    return dict(sorted(sources.items()))


def flat_name(file: Path, root: Path) -> str:
    """Name of a file's module in the exported folder."""
    parts = list(file.relative_to(root).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return parts[1] if parts[0] == "hf" else "_".join(["titans", *parts])


def rewrite_imports(file: Path, root: Path) -> tuple[str, set[Path]]:
    """A file's source with flat imports, and the files of the package that it imports.

    Raises:
        ValueError: An import has a form that cannot be followed.
    """
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    needed = set()
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    # From the last to the first: a rewritten import may take more lines.
    for node in sorted(imports, key=lambda node: node.lineno, reverse=True):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = _target(node, file, root)
            needed.add(target)
            flat = f"from .{flat_name(target, root)} import"
            lines[node.lineno - 1] = re.sub(r"from\s+\.[.\w]*\s+import", flat, lines[node.lineno - 1], count=1)
        elif _foreign(node, file, root):
            lines[node.lineno - 1 : node.end_lineno] = _guarded(node, lines, file)
    header = f"# titans_mcore/{file.relative_to(root).as_posix()} with its imports made flat.\n"
    return header + "\n".join(lines) + "\n", needed


def _target(node: ast.ImportFrom, file: Path, root: Path) -> Path:
    """The file that a relative import names."""
    where = f"{file}, line {node.lineno}"
    folder = file.parents[node.level - 1]
    if node.module is None or not folder.is_relative_to(root):
        raise ValueError(f"{where}: an exported file must import from a module inside the package by its name")
    path = folder.joinpath(*node.module.split("."))
    found = [option for option in (path.with_suffix(".py"), path / "__init__.py") if option.is_file()]
    if not found:
        raise ValueError(f"{where}: there is no module {'.' * node.level}{node.module}")
    for alias in node.names:
        is_module = found[0].name == "__init__.py" and (path / f"{alias.name}.py").is_file()
        if is_module and alias.name not in _imported_names(found[0]):
            raise ValueError(f"{where}: {alias.name} is a module; import names from it instead of the module itself")
    return found[0]


def _imported_names(file: Path) -> set[str]:
    """Names that a package's __init__ imports from its modules; one of them may be named like its module."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {alias.asname or alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}


def _foreign(node: ast.Import | ast.ImportFrom, file: Path, root: Path) -> bool:
    """Whether an absolute import needs a package that may be missing where the export is used."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    tops = {name.partition(".")[0] for name in names}
    if root.name in tops:
        raise ValueError(f"{file}, line {node.lineno}: an exported file must import {root.name} relatively")
    return not tops <= _ALWAYS_THERE


def _guarded(node: ast.Import | ast.ImportFrom, lines: list[str], file: Path) -> list[str]:
    """The import inside a try: transformers demands every package that a file imports outside one."""
    assert node.end_lineno is not None
    own = lines[node.lineno - 1 : node.end_lineno]
    if ";" in "".join(own):
        raise ValueError(f"{file}, line {node.lineno}: give the import of an optional package a line of its own")
    indent = " " * node.col_offset
    return [f"{indent}try:", *(f"    {line}" for line in own), f"{indent}except ImportError:", f"{indent}    raise"]


def _imports_of_rest(entry: str, sources: dict[str, str]) -> str:
    """Imports of all that an entry needs only through others: transformers 4 copies what the entry itself names."""
    direct = set(re.findall(r"^\s*from \.(\w+) import", sources[entry], re.MULTILINE))
    reached, waiting = set(direct), sorted(direct)
    while waiting:
        found = set(re.findall(r"^\s*from \.(\w+) import", sources[f"{waiting.pop()}.py"], re.MULTILINE))
        waiting += sorted(found - reached)
        reached |= found
    rest = sorted(reached - direct - {entry.removesuffix(".py")})
    if not rest:
        return ""
    note = "\n\n# Every other file that this one needs: some versions of transformers copy only those that it names.\n"
    head = "from typing import TYPE_CHECKING  # noqa\n\nif TYPE_CHECKING:\n"
    return note + head + "".join(f"    from .{name} import __name__ as _  # noqa\n" for name in rest)

"""One module of the package as the export reads it: its statements, its names, and what it imports."""

import ast
import symtable
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

Import = ast.Import | ast.ImportFrom
ANY = TOP, LOADING, LATER = "at its top", "while loading", "later"
"""When an import runs; `while loading` is inside an if, a try or a class."""
_ALWAYS_THERE = {"torch", "transformers", *sys.stdlib_module_names}
_WIDTH = 120
_PLACE = {"__file__", "__package__", "__path__", "__spec__"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class Taken(NamedTuple):
    """One name that an import gives."""

    source: Path | str
    """The file of the package that it comes from, or the dotted name of what is no part of the package."""
    name: str | None
    """The name there; None for the whole module."""
    renamed: str | None
    """What it is called here, if otherwise."""


class PackageModule:
    """A file of the package.

    Args:
        file: The file.
        root: The package's folder.

    Raises:
        ValueError: An import has a form that the export cannot follow.
    """

    def __init__(self, file: Path, root: Path) -> None:
        self.file, self.root, self.title = file, root, f"{root.name}/{file.relative_to(root).as_posix()}"
        self.source = file.read_text(encoding="utf-8")
        self.tree = ast.parse(self.source)
        self._lines = [[line] for line in self.source.split("\n")]  # one may become none or several
        self._dropped: list[ast.stmt] = []
        self.imports = list(_imports(self.tree, TOP))
        self.taken = {node: self._taken(node) for node, _ in self.imports}

    def at_top(self) -> list[Taken]:
        """What the imports at its top give."""
        return [taken for node, when in self.imports if when == TOP for taken in self.taken[node]]

    def files(self, *kinds: str) -> list[Path]:
        """Files of the package that it imports, at these times."""
        every = [taken.source for node, when in self.imports if when in kinds for taken in self.taken[node]]
        return [source for source in every if isinstance(source, Path)]

    def where(self, node: ast.stmt) -> str:
        """A statement's place, as messages begin."""
        return f"{self.file}, line {node.lineno}"

    def _taken(self, node: Import) -> list[Taken]:
        assert node.end_lineno is not None
        before = self._lines[node.lineno - 1][0].encode()[: node.col_offset]
        after = self._lines[node.end_lineno - 1][0].encode()[node.end_col_offset :].strip()
        if before.strip() or (after and not after.startswith(b"#")):
            raise ValueError(f"{self.where(node)}: give an import a line of its own")
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if not relative and self.root.name in {module.partition(".")[0] for module in modules}:
            raise ValueError(f"{self.where(node)}: an exported file must import {self.root.name} relatively")
        if isinstance(node, ast.Import):
            return [Taken(alias.name, None, alias.asname) for alias in node.names]
        if node.names[0].name == "*":
            raise ValueError(f"{self.where(node)}: an exported file must import names instead of *")
        source = self._target(node) if relative else modules[0]
        return [Taken(source, alias.name, alias.asname) for alias in node.names]

    def _target(self, node: ast.ImportFrom) -> Path:
        """The file that a relative import names."""
        folder = self.file.parents[node.level - 1]
        path = folder.joinpath(*(node.module or "").split("."))
        if not path.is_relative_to(self.root) or path == self.root:
            raise ValueError(
                f"{self.where(node)}: an exported file must import from a module inside the package by its name"
            )
        found = [option for option in (path.with_suffix(".py"), path / "__init__.py") if option.is_file()]
        if not found:
            raise ValueError(f"{self.where(node)}: there is no module {'.' * node.level}{node.module or ''}")
        return found[0]

    @cached_property
    def names(self) -> dict[str, Taken | None]:
        """The names of the module, with where the imported ones come from; None for what it defines."""
        given: dict[str, Taken] = {}
        for node, _ in self.imports:  # those at the top come first
            for taken in self.taken[node]:
                given.setdefault(taken.renamed or taken.name or str(taken.source).partition(".")[0], taken)
        found = [symbol for symbol in self._symbols[0].get_symbols() if symbol.is_assigned() or symbol.is_imported()]
        names = {s.get_name(): None if s.is_assigned() else given[s.get_name()] for s in found}
        return {name: taken for name, taken in names.items() if name != "__all__"}

    @cached_property
    def builtins(self) -> set[str]:
        """The names that it reads and does not have.

        Raises:
            ValueError: One of them tells the module where it lies.
        """
        read = {s.get_name() for s in self._symbols[0].get_symbols() if s.is_referenced()}
        read |= {
            s.get_name() for t in self._symbols[1:] for s in t.get_symbols() if s.is_global() and s.is_referenced()
        }
        if told := sorted(_PLACE & read):
            raise ValueError(f"{self.file}: {told[0]} is another one where the file is exported; do without it")
        return read - set(self.names)

    @cached_property
    def _symbols(self) -> list[symtable.SymbolTable]:
        """The module's own table, and those inside it."""
        tables = [symtable.symtable(self.source, str(self.file), "exec")]
        for table in tables:
            tables += table.get_children()
        return tables

    def statements(self) -> Iterator[tuple[ast.stmt | None, list[str]]]:
        """Each statement behind the docstring with its lines and those that lead to it; of imports only the latter."""
        start = self._behind_docstring
        for node in self.tree.body[1 if start else 0 :]:
            assert node.end_lineno is not None
            lines = self._text(start, node.end_lineno)
            if isinstance(node, Import) or (isinstance(node, ast.Assign) and ast.unparse(node).startswith("__all__")):
                lines = self._text(start, node.lineno - 1)
                while lines and lines[-1].strip():  # a comment on it goes with it
                    lines.pop()
            yield node, lines
            start = node.end_lineno
        yield None, self._text(start, len(self._lines))

    @property
    def docstring(self) -> list[str]:
        """The lines of its docstring."""
        return self._text(0, self._behind_docstring)

    @property
    def _behind_docstring(self) -> int:
        return (self.tree.body[0].end_lineno or 0) if ast.get_docstring(self.tree, clean=False) is not None else 0

    def _text(self, start: int, end: int) -> list[str]:
        return [line for lines in self._lines[start:end] for line in lines]

    def text(self, node: Import) -> list[str]:
        """The lines of an import, not indented."""
        return [line[node.col_offset :] for line in self._text(node.lineno - 1, node.end_lineno or 0)]

    def replace(self, node: Import, lines: Sequence[str]) -> None:
        """Puts other lines in an import's place; with none, what would be left empty goes with it or gets a pass."""
        where = slice(node.lineno - 1, node.end_lineno)
        self._lines[where] = [[] for _ in self._lines[where]]
        self._lines[node.lineno - 1] = [" " * node.col_offset + line for line in lines]
        if lines:
            return
        self._dropped.append(node)
        parent, block = next(
            (parent, block)
            for parent in ast.walk(self.tree)
            for block in (getattr(parent, field, None) for field in ("body", "orelse", "finalbody"))
            if isinstance(block, list) and node in block
        )
        if any(other not in self._dropped for other in block):
            if self._lines[where.stop] == [""]:
                self._lines[where.stop] = []
        elif isinstance(parent, ast.If) and only_for_types(parent):
            self._lines[parent.lineno - 1] = []
        else:
            self._lines[node.lineno - 1] = [" " * node.col_offset + "pass"]

    def hidden(self, node: Import, name: str) -> bool:
        """Whether a function around an import has a variable of this name, which would hide the module's."""
        around = [x for x in ast.walk(self.tree) if isinstance(x, _FUNCTIONS) and node in ast.walk(x)]
        return any(
            (isinstance(x, ast.arg) and x.arg == name)
            or (isinstance(x, ast.Name) and x.id == name and isinstance(x.ctx, ast.Store))
            for function in around
            for x in ast.walk(function)
        )


def guarded(lines: Sequence[str]) -> list[str]:
    """An import inside a try."""
    return ["try:", *(f"    {line}" for line in lines), "except ImportError:", "    raise"]


def only_for_types(node: ast.AST) -> bool:
    """Whether it is `if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not node.orelse


def _imports(node: ast.AST, when: str) -> Iterator[tuple[Import, str]]:
    """Every import inside a node, those that stand in it itself first."""
    children = list(ast.iter_child_nodes(node))
    yield from ((child, when) for child in children if isinstance(child, Import))
    for child in children:
        later = when == LATER or isinstance(child, _FUNCTIONS) or only_for_types(child)
        yield from _imports(child, LATER if later else LOADING)


def may_be_missing(source: Path | str) -> bool:
    """Whether a package may be missing where the export is used."""
    return isinstance(source, str) and source[0] != "." and source.partition(".")[0] not in _ALWAYS_THERE


def import_blocks(every: Iterable[Taken]) -> Iterator[str]:
    """Imports by kind: __future__, the standard library, other packages, those that may be missing, the folder."""
    statements: dict[tuple[int, bool, str], list[Taken]] = {}
    for taken in every:
        source = str(taken.source)
        top = source.partition(".")[0]
        kind = 0 if top == "__future__" else 1 if top in sys.stdlib_module_names else 2 if top in _ALWAYS_THERE else 3
        which = source if taken.name else f"{source} as {taken.renamed}"  # `import x` takes one name
        statements.setdefault((kind if top else 4, taken.name is not None, which), []).append(taken)
    for kind in sorted({kind for kind, *_ in statements}):
        block = [import_of(statements[key]) for key in sorted(statements) if key[0] == kind]
        yield "\n".join(line for lines in block for line in lines)


def import_of(every: list[Taken]) -> list[str]:
    """One import of names from one source, inside a try where transformers would demand an optional package."""
    source, renamed = every[0].source, every[0].renamed
    names = sorted(
        {f"{taken.name} as {taken.renamed}" if taken.renamed else str(taken.name) for taken in every},
        key=lambda name: (not name.isupper(), name[0].islower(), name),
    )
    if every[0].name is None:
        lines = [f"import {source} as {renamed}" if renamed else f"import {source}"]
    elif len(line := f"from {source} import {', '.join(names)}") <= _WIDTH:
        lines = [line]
    else:
        lines = [f"from {source} import (", *(f"    {name}," for name in names), ")"]
    return guarded(lines) if may_be_missing(source) else lines

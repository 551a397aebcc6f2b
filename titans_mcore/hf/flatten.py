"""The package's own modelling code as few files in one folder, which is all that transformers' loader follows.

A room of the package becomes one file: its modules in the order in which Python runs them, each behind a line that
names it. What a module defines stays as it is, line for line; the imports at its top are gathered at the file's top,
and all imports name files of the folder. What would not mean the same in one file is refused.
"""

import graphlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from titans_mcore.hf.package_module import (
    ANY,
    LOADING,
    TOP,
    Import,
    PackageModule,
    Taken,
    guarded,
    import_blocks,
    import_of,
    may_be_missing,
)

PACKAGE_FOLDER = Path(__file__).parents[1]
ENTRIES = ("modeling_titans", "configuration_titans")
"""Modules of hf that a language model's config.json names."""
_FILES = {
    "hf/modeling_titans": "modeling_titans",
    "hf/tasks_titans": "tasks_titans",
    "hf/configuration_titans": "configuration_titans",
    "config": "configuration_titans",
    "decoding": "titans_mixers",
    "linear": "titans_mixers",
}
"""Modules and rooms that go into another file than titans_<room>."""
_WHOLE = {"mixers"}
"""Rooms whose every module counts as imported by the room: it may find them itself instead of naming them."""


def flatten_code(root: Path = PACKAGE_FOLDER, entries: tuple[str, ...] = ENTRIES) -> dict[str, str]:
    """Every file that the entries in `root`/hf need, them included: name in the exported folder to source.

    Raises:
        ValueError: An import cannot be followed, or modules do not go into one file; the message names them.
    """
    folder = _ExportedFolder(root, entries)
    folder.check_order()
    for file in folder.files:
        folder.check_names(file)
    return {f"{file}.py": folder.source(file) for file in sorted(folder.files)}


class _ExportedFolder:
    """The modules that the entries need, and the files that they go into."""

    def __init__(self, root: Path, entries: tuple[str, ...]) -> None:
        self.root, self.entries = root, entries
        self.modules: dict[Path, PackageModule] = {}
        self.loaded = self._needed(TOP, LOADING)
        self.files: dict[str, list[PackageModule]] = {}
        # Python runs a room's __init__ first.
        for path in sorted(self._needed(*ANY), key=lambda path: (path.name != "__init__.py", path)):
            self.files.setdefault(self.file_of(path), []).append(self.modules[path])

    def file_of(self, path: Path) -> str:
        """Name of the file that a module goes into."""
        path = path.relative_to(self.root).with_suffix("")
        return _FILES.get(path.as_posix()) or _FILES.get(path.parts[0]) or f"titans_{path.parts[0]}"

    def _needed(self, *kinds: str) -> set[Path]:
        """The entries and all that they import, at these times."""
        needed: set[Path] = set()
        waiting = [self.root / "hf" / f"{entry}.py" for entry in self.entries]
        while waiting:
            path = waiting.pop()
            if path not in needed:
                needed.add(path)
                if path not in self.modules:
                    self.modules[path] = PackageModule(path, self.root)
                waiting += [run for source in self.modules[path].files(*kinds) for run in self._run_by(source)]
                if path.name == "__init__.py" and path.parent.name in _WHOLE:
                    waiting += path.parent.glob("*.py")
        return needed

    def _run_by(self, path: Path) -> list[Path]:
        """What Python runs to import a module: first the __init__ of the folders that it lies in."""
        inside = [folder for folder in reversed(path.parents) if folder != self.root]
        first = [folder / "__init__.py" for folder in inside if folder.is_relative_to(self.root)]
        return [path for path in first if path.is_file() and path.stat().st_size] + [path]

    def _links(self, *kinds: str) -> dict[str, set[str]]:
        """The files that each file imports, at these times."""
        return {
            file: {self.file_of(source) for module in members for source in module.files(*kinds)} - {file}
            for file, members in self.files.items()
        }

    def check_order(self) -> None:
        """Raises ValueError where files need each other to be loaded, or one would need more than its modules do."""
        try:
            graphlib.TopologicalSorter(self._links(TOP, LOADING)).prepare()
        except graphlib.CycleError as error:
            files = ".py and ".join(sorted(set(error.args[1])))
            raise ValueError(
                f"{files}.py would import each other; let one import inside the functions that need it"
            ) from None
        for file, members in self.files.items():
            early = [module for module in members if module.file in self.loaded]
            for module in members if early else []:
                missing = [taken.source for taken in module.at_top() if may_be_missing(taken.source)]
                if module not in early and missing:
                    raise ValueError(
                        f"{module.file}: {file}.py is loaded where {missing[0]} may be missing; import it inside the "
                        "functions that need it"
                    )

    def check_names(self, file: str) -> None:
        """Raises ValueError where a name means one thing in a module of a file and another in the next."""
        members, known = self.files[file], dict[str, tuple[str, PackageModule]]()
        for module in members:
            for name in sorted({*module.names, *module.builtins}):
                meaning = self._meaning(module, name)
                other, first = known.setdefault(name, (meaning, module))
                if other != meaning:
                    raise ValueError(
                        f"{first.title} and {module.title} go into {file}.py, but {name} is {other} in the first and "
                        f"{meaning} in the second; rename one"
                    )
        if len({frozenset(taken for taken in m.at_top() if taken.source == "__future__") for m in members}) > 1:
            raise ValueError(f"the modules of {file}.py have different imports from __future__; give all the same")

    def _meaning(self, module: PackageModule, name: str) -> str:
        """Where a name of a module comes from, in the end."""
        taken = module.names[name] if name in module.names else Taken("builtins", name, None)
        if taken is None:
            return f"{module.title}:{name}"
        if isinstance(taken.source, str):
            whole = taken.source if taken.renamed else name
            return f"{taken.source}.{taken.name}" if taken.name else whole
        return self._meaning(self.modules[taken.source], self._checked_name(module, taken))

    def _checked_name(self, module: PackageModule, taken: Taken) -> str:
        """The name that is taken from a module of the package."""
        assert isinstance(taken.source, Path)
        assert taken.name
        if taken.name not in self.modules[taken.source].names:
            raise ValueError(
                f"{module.file}: {taken.name} is a module or nothing in {taken.source}; import names from modules"
            )
        return taken.name

    def source(self, file: str) -> str:
        """The text of a file."""
        members = self.files[file]
        for module in members:
            for node, when in module.imports:
                if when != TOP:
                    self._rewrite(module, node, when, file)
        main = next((module for module in members if module.file.stem in (file, "__init__")), None)
        top = [f"# Modules of {self.root.name}, line for line; the imports at their tops are gathered at this one's."]
        top += main.docstring if main else []
        gathered = {self._flat(taken) for module in members for taken in module.at_top()}
        parts = ["\n".join(top), *import_blocks(taken for taken in gathered if taken.source != f".{file}")]
        done: set[Path] = set()
        for module in members:
            if module.file not in done:
                parts += self._sections(module, file, done, main)
        if file in self.entries:
            parts += self._imports_of_rest(file)
        return "\n\n".join(parts) + "\n"

    def _flat(self, taken: Taken) -> Taken:
        """The same name, taken from a file of the exported folder."""
        return taken._replace(source=f".{self.file_of(taken.source)}") if isinstance(taken.source, Path) else taken

    def _rewrite(self, module: PackageModule, node: Import, when: str, file: str) -> None:
        """Makes an import flat that stays where it is."""
        every = module.taken[node]
        if any(may_be_missing(taken.source) for taken in every):
            module.replace(node, guarded(module.text(node)))
        if isinstance(every[0].source, str):
            return
        names = [self._checked_name(module, taken) for taken in every]
        flat = [self._flat(taken) for taken in every]
        if flat[0].source != f".{file}":
            module.replace(node, import_of(flat))
        elif when == LOADING:
            raise ValueError(
                f"{module.where(node)}: both modules go into {file}.py; import at the top or in a function"
            )
        elif hidden := [name for name in names if module.hidden(node, name)]:
            raise ValueError(f"{module.where(node)}: a variable here is called {hidden[0]} too; rename it")
        else:
            module.replace(node, _renamings(every))

    def _sections(self, module: PackageModule, file: str, done: set[Path], main: PackageModule | None) -> Iterator[str]:
        """A module's code, cut where Python runs other modules of the file before it goes on."""
        done.add(module.file)
        head = [f"\n# ---- {module.title} ----", *([] if module is main else module.docstring)]
        code: list[str] = []
        for node, lines in module.statements():
            every = module.taken[node] if isinstance(node, Import) else []
            sources = [taken.source for taken in every if isinstance(taken.source, Path)]
            for path in [run for source in sources for run in self._run_by(source)]:
                if path not in done and self.file_of(path) == file:
                    if any(line and not line.startswith("#") for line in code):
                        yield "\n".join([*head, *code]).rstrip("\n")
                        head, code = head[:1], []
                    yield from self._sections(self.modules[path], file, done, main)
            inside = [taken for taken in every if self._flat(taken).source == f".{file}"]
            code += [*(lines if any(lines) else []), *_renamings(inside)]
        if code:
            yield "\n".join([*head, *code]).rstrip("\n")

    def _imports_of_rest(self, entry: str) -> list[str]:
        """Imports of all that an entry needs only through others: transformers 4 copies what the entry itself names."""
        links = self._links(*ANY)
        reached, waiting = {entry}, [entry]
        while waiting:
            new = links[waiting.pop()] - reached
            reached |= new
            waiting += new
        rest = sorted(reached - links[entry] - {entry})
        lines = [
            "\n# Every other file that this one needs: some versions of transformers copy only those that it names.",
            "from typing import TYPE_CHECKING  # noqa\n\nif TYPE_CHECKING:",
            *(f"    from .{name} import __name__ as _  # noqa" for name in rest),
        ]
        return ["\n".join(lines)] if rest else []


def _renamings(every: Iterable[Taken]) -> list[str]:
    return [f"{taken.renamed} = {taken.name}" for taken in every if taken.renamed]

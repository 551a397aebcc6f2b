"""The paper's tables: its own numbers beside those of trained models.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError


@dataclass(frozen=True)
class PaperSettings:
    """Writes the paper's tables with its own numbers beside those of your models.

    Reads harness.json and niah.json, as the other commands of evals write them, from FOLDER and FOLDER/eval, whichever
    has them first. A cell that was not run is empty.
    """

    models: tuple[str, ...]
    """NAME=FOLDER each: a run, or a folder of finished results."""
    output: Path
    """Folder for paper.md."""

    def __post_init__(self) -> None:
        names = [model.partition("=")[0] for model in self.models]
        for model, name in zip(self.models, names, strict=True):
            if not name or not model.partition("=")[2] or "/" in name:
                raise EvaluationError(f"--models {model}: give NAME=FOLDER, such as mac=runs/mac")
        if len(set(names)) < len(names) or not names:
            raise EvaluationError(f"--models {' '.join(names) or 'is empty'}; give every model a name of its own")

    @property
    def folders(self) -> dict[str, Path]:
        """Folders by name."""
        return {name: Path(folder) for name, _, folder in (model.partition("=") for model in self.models)}

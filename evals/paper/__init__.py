"""The paper's tables: its own numbers beside those of trained models.

Its settings are here and import nothing heavy: `--help` must be quick.
"""

from dataclasses import dataclass
from pathlib import Path

from evals.command_line import EvaluationError


@dataclass(frozen=True)
class PaperSettings:
    """Writes the paper's tables with its own numbers beside those of your models: Markdown, JSON and plots.

    Reads harness.json, niah.json, babilong.json, position_perplexity.json and context.json, as the other commands of
    evals write them, from OUTPUT/NAME, FOLDER, and FOLDER/eval, whichever has them first. A cell that was not run is
    empty.
    """

    models: tuple[str, ...]
    """NAME=FOLDER each: a run, an exported folder, or a folder of finished results."""
    output: Path
    """Folder for paper.md, paper.json and the plots, and for what --run adds."""
    run: bool = False
    """Run what is missing first, into OUTPUT/NAME; FOLDER must then be a run or an exported folder."""
    only: tuple[str, ...] = ("harness", "niah", "babilong", "position_perplexity", "context")
    """--run: which evaluations."""
    harness_data: Path | None = None
    """--run: --data of evals.harness; by default the hub's data sets."""
    harness_limit: int | None = None
    """--run: --limit of evals.harness."""
    niah_lengths: tuple[int, ...] = (2_048, 4_096, 8_192, 16_384)
    """--run: --lengths of evals.niah; the paper's table has the default."""
    niah_samples: int = 46
    """--run: --samples of evals.niah, for each of 11 depths; the paper has about 500 in all."""
    niah_text: Path | None = None
    """--run: --text of evals.niah."""
    babi: Path | None = None
    """--run: --babi of evals.babilong."""
    pg19: Path | None = None
    """--run: --pg19 of evals.babilong."""
    babilong_lengths: tuple[int, ...] = (0, 1_000, 2_000, 4_000, 8_000, 16_000)
    """--run: --lengths of evals.babilong."""
    babilong_samples: int = 100
    """--run: --samples of evals.babilong."""
    data: Path | None = None
    """--run: --data of evals.position_perplexity, a folder of shards."""
    text: tuple[Path, ...] = ()
    """--run: --text of evals.position_perplexity, in place of --data."""
    position_length: int = 16_384
    """--run: --length of evals.position_perplexity."""
    context_lengths: tuple[int, ...] = (2_048, 16_384, 131_072)
    """--run: --lengths of evals.efficiency context."""

    def __post_init__(self) -> None:
        names = [model.partition("=")[0] for model in self.models]
        for model, name in zip(self.models, names, strict=True):
            if not name or not model.partition("=")[2] or "/" in name:
                raise EvaluationError(f"--models {model}: give NAME=FOLDER, such as mac=runs/mac")
        if len(set(names)) < len(names) or not names:
            raise EvaluationError(f"--models {' '.join(names) or 'is empty'}; give every model a name of its own")
        from evals.paper.results import KINDS

        unknown = [kind for kind in self.only if kind not in KINDS]
        if unknown:
            raise EvaluationError(f"--only {' '.join(unknown)}; give some of {' '.join(KINDS)}")

    @property
    def folders(self) -> dict[str, Path]:
        """Folders by name."""
        return {name: Path(folder) for name, _, folder in (model.partition("=") for model in self.models)}

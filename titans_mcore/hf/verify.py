"""Repeats an exported folder's proof, on any machine: `python -m titans_mcore.hf.verify FOLDER`.

Every file must be the one that was exported, and the model must compute what it computed when the folder was made; that
is in its proof.json. Nothing but the folder is needed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from titans_mcore.command_line import parse_settings, run_command
from titans_mcore.hf.exported import PROOF, read_json
from titans_mcore.hf.folder import ExportError, ProofFailed
from titans_mcore.hf.proof import FORMAT, Comparison, compare, outputs_of, shown
from titans_mcore.io import sha256_of


@dataclass(frozen=True)
class ProofSettings:
    """Repeats the proof of an exported folder."""

    folder: Annotated[Path, tyro.conf.Positional]
    """The exported folder."""
    device: str = "cpu"
    """Where the model computes, such as cpu or cuda."""
    tolerance: float = 1e-4
    """Difference that is allowed, as a share of the largest output; other processors round otherwise."""


def verify(folder: Path, *, device: str = "cpu", tolerance: float = 1e-4) -> Comparison:
    """Repeats the proof of an exported folder; see ProofSettings for the arguments.

    Raises:
        ExportError: There is no proof that can be read.
        ProofFailed: A file is missing or has changed, the folder could not be loaded, or it computes something else.
    """
    proof = read_json(file := folder / PROOF)
    if (written := proof.get("format")) != FORMAT:
        raise ExportError(f"{file} has format {written}; this version reads format {FORMAT}, export the folder again")
    _check_files(folder, proof["files"])
    example, expected = (
        {name: torch.tensor(value) for name, value in proof[side].items()} for side in ("inputs", "outputs")
    )
    found = outputs_of(folder, proof["auto_class"], example, device)
    return compare({name: shown(found[name]) for name in expected}, expected, tolerance * proof["largest_output"])


def _check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, known in files.items():
        file = folder / name
        if not file.is_file():
            raise ProofFailed(f"{file} is missing; copy or export the folder again")
        if file.stat().st_size != known["bytes"] or sha256_of(file) != known["sha256"]:
            raise ProofFailed(f"{file} is not the file that was exported; copy or export the folder again")


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(ProofSettings, "python -m titans_mcore.hf.verify")
    found = verify(**vars(settings))
    print(
        f"verified {settings.folder} on {settings.device}: {found.compared:,} numbers differ from the trained model's "
        f"by at most {found.max_abs_error:.3g} ({found.allowed:.3g} is allowed)"
    )


if __name__ == "__main__":
    run_command(main)

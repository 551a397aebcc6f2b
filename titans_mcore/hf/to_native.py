"""The way back: `python -m titans_mcore.hf.to_native --folder HF --output RUN` makes a run folder of an exported model.

Its checkpoint holds the weights alone. It is evaluated and exported like any other, and training that is started with
this run folder begins with it, at any layout, with a new optimizer.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from titans_mcore.command_line import parse_settings, run_command
from titans_mcore.hf.exported import read_config, read_weights
from titans_mcore.hf.folder import ExportError, staged_folder
from titans_mcore.hf.mapping import to_native
from titans_mcore.hf.tokenizer import SENTENCEPIECE
from titans_mcore.io import sha256_of
from titans_mcore.weights import BEGINS, MARKER, WEIGHTS_FOLDER, ShardHeader, save_shard

_CHECKPOINT = "step-00000000"


@dataclass(frozen=True)
class ImportSettings:
    """Makes a run folder of an exported Hugging Face model, to evaluate it or to train it further."""

    folder: Path
    """The exported folder; after fine-tuning, what save_pretrained wrote."""
    output: Path
    """Run folder to write; it may not exist yet."""
    no_verify: bool = False
    """Do not compare the folder's files with the checksums in its proof.json."""


def import_run(folder: Path, output: Path, *, no_verify: bool = False) -> Path:
    """Writes a run folder with one checkpoint; see ImportSettings.

    Returns:
        The checkpoint.

    Raises:
        ExportError: The folder is not a whole export, or something stands where the run should go.
    """
    if output.exists():
        raise ExportError(f"--output {output} exists; name a run folder that does not")
    config = read_config(folder)
    exported = read_weights(folder, verify=not no_verify)
    try:
        tensors = to_native(config, {name: tensor.float() for name, tensor in exported.items()})
    except ValueError as error:
        raise ExportError(f"{folder}: {error}") from error
    with staged_folder(output) as staging:
        checkpoint = staging / "checkpoints" / _CHECKPOINT
        # One rank holds the whole of each tensor, which is all that this file has to say of how they are shared.
        header = ShardHeader({name: tensor.shape for name, tensor in tensors.items()}, dict.fromkeys(tensors))
        place = {"rank": 0, "size": 1, "step": 0, "tokens": 0}
        save_shard(checkpoint / WEIGHTS_FOLDER, header, tensors.items(), config, **place)
        files = {
            str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(checkpoint.rglob("*"))
            if file.is_file()
        }
        record = {"step": 0, "samples": 0, "tokens": 0, BEGINS: folder.resolve().name, "files": files}
        (checkpoint / MARKER).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if (folder / SENTENCEPIECE).is_file():
            (staging / "tokenizer").mkdir()
            (staging / "tokenizer" / SENTENCEPIECE).write_bytes((folder / SENTENCEPIECE).read_bytes())
    return output / "checkpoints" / _CHECKPOINT


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(ImportSettings, "python -m titans_mcore.hf.to_native")
    checkpoint = import_run(**vars(settings))
    print(f"{settings.folder} is {checkpoint} now; training with --run-dir {settings.output} begins with its weights")


if __name__ == "__main__":
    run_command(main)

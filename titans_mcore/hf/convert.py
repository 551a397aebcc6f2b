"""Exports a run as a Hugging Face folder: `python -m titans_mcore.hf.convert --checkpoint RUN --output DIR`.

The folder holds the weights (safetensors), the tokenizer, the modelling code and a proof that both sides compute the
same. `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` loads it where this package is not installed.
"""

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from titans_mcore.command_line import parse_settings, run_command
from titans_mcore.config import TitansConfig
from titans_mcore.hf import proof
from titans_mcore.hf.card import model_card
from titans_mcore.hf.folder import ExportError, check_output, staged_folder
from titans_mcore.hf.mapping import to_exported
from titans_mcore.hf.tokenizer import TokenizerModel, read_tokenizer, write_tokenizer
from titans_mcore.weights import find_checkpoint, load_full

if TYPE_CHECKING:
    from titans_mcore.hf.modeling_titans import TitansForCausalLM


@dataclass(frozen=True)
class ExportSettings:
    """Exports a trained model as a Hugging Face folder, and proves that it computes the same."""

    checkpoint: Path
    """Run folder (its newest whole checkpoint is taken), or one checkpoint of it."""
    output: Path
    """Folder to write. It appears when everything is done; an earlier export there is replaced."""
    tokenizer: Path | None = None
    """The sentencepiece model of the run's data; by default tokenizer/tokenizer.model in the run folder."""
    overwrite: bool = False
    """Replace the output folder even if it is not an earlier export."""
    no_verify: bool = False
    """Do not compare the checkpoint's files with the checksums that were noted when they were written."""
    skip_proof: bool = False
    """Do not compare the exported model with the trained one."""
    max_shard_size: str = "5GB"
    """Weights larger than this are spread over several files, such as 5GB or 300MB."""


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    output: Path
    """The folder."""
    checkpoint: Path
    """What it was made from."""
    parameters: int
    """Parameters, tied ones counted once."""
    max_abs_error: float | None
    """Largest difference of a logit between the exported and the trained model; None without proof."""
    caveat: str | None
    """Where the exported tokenizer may give other ids than the run's; None when nowhere."""


def export(checkpoint: Path | str, output: Path | str, **options: Any) -> ExportReport:
    """Writes a Hugging Face folder; see ExportSettings for the arguments.

    Raises:
        ExportError: No usable checkpoint or tokenizer, or something stands where the folder should go.
        ProofFailed: The exported model computes something else than the trained one; nothing was written then.
    """
    settings = ExportSettings(Path(checkpoint), output := Path(output), **options)
    try:
        folder = find_checkpoint(settings.checkpoint)
    except ValueError as fault:
        raise ExportError(str(fault)) from fault
    tokenizer_file = Path(settings.tokenizer or _tokenizer_of_run(folder))
    check_output(output, overwrite=settings.overwrite, inputs=[folder, tokenizer_file])
    if not re.fullmatch(r"\d+ ?[KMGT]B", settings.max_shard_size):
        raise ExportError(f"--max-shard-size is {settings.max_shard_size!r}; give a size such as 5GB or 300MB")
    pieces = read_tokenizer(tokenizer_file)
    config, native, exported = _load(folder, verify=not settings.no_verify)
    if pieces.vocab_size != config.vocab_size:
        raise ExportError(
            f"tokenizer {pieces.file} has {pieces.vocab_size} pieces, the model {config.vocab_size}; "
            "give the tokenizer that the run's data was made with"
        )
    from transformers.utils import logging

    from titans_mcore.hf.save import auto_class, write_model

    logging.disable_progress_bar()
    model, error = _model(config, exported, pieces), None
    with staged_folder(output) as staging:
        write_model(model, staging, settings.max_shard_size)
        write_tokenizer(pieces, staging)
        if not settings.skip_proof:
            prompt = proof.fixed_prompt(config, pieces.bos_id)
            logits = proof.native_logits(config, native, prompt)
            example, answer = {"input_ids": torch.tensor([prompt])}, {"logits": logits[None]}
            error = proof.prove(staging, auto_class(model), example, answer)
        parameters = sum(tensor.numel() for tensor in exported.values())
        card = model_card(config, parameters, folder, error, pieces.caveat)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return ExportReport(output, folder, parameters, error, pieces.caveat)


def _load(folder: Path, *, verify: bool) -> tuple[TitansConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Settings and whole weights, by both names; how memory and attention were computed is no part of an export."""
    try:
        config, native = load_full(folder, verify=verify)
        config = replace(config, memory_backend="auto", attention_backend="auto", linear_backend="torch")
        return config, native, to_exported(config, native)
    except ValueError as error:
        raise ExportError(str(error)) from error


def _tokenizer_of_run(checkpoint: Path) -> Path:
    """RUN/tokenizer/tokenizer.model for RUN/checkpoints/step-N, or beside a checkpoint that lies elsewhere."""
    places = [folder / "tokenizer" / "tokenizer.model" for folder in (checkpoint, *checkpoint.absolute().parents[:2])]
    return next((place for place in places if place.is_file()), places[-1])


def _model(config: TitansConfig, tensors: dict[str, Tensor], pieces: TokenizerModel) -> "TitansForCausalLM":
    """The exported model; its weights are these tensors."""
    from transformers import GenerationConfig

    from titans_mcore.hf.configuration_titans import TitansHFConfig
    from titans_mcore.hf.modeling_titans import TitansForCausalLM

    special = {"bos_token_id": pieces.bos_id, "eos_token_id": pieces.eos_id}
    with torch.device("meta"):
        model = TitansForCausalLM(TitansHFConfig.from_titans(config, **special))
    if config.tie_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embedding.weight"]}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**special, pad_token_id=pieces.pad_id)
    return model


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(ExportSettings, "python -m titans_mcore.hf.convert")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on a hub
    report = export(**vars(settings))
    print(f"exported {report.checkpoint} to {report.output}: {report.parameters:,} parameters")
    if report.caveat:
        print(f"warning: {report.caveat}", file=sys.stderr)
    if report.max_abs_error is None:
        print("not proven: the exported model was not compared with the trained one (--skip-proof)")
    else:
        print(f"largest difference of a logit from the trained model: {report.max_abs_error:.3g}")


if __name__ == "__main__":
    run_command(main)

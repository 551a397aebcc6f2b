"""Which documents a step learned from: `python -m pretrain.data.batch_documents --run DIR --step N`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
import tyro

from pretrain.config.files import load_run_config
from pretrain.data.folders import NumberedSamples, RunData, open_data, open_samples
from pretrain.schedule import Portion, portion_of
from titans_mcore.command_line import run_command
from tokenization.command_line import TokenizationError
from tokenization.trace import origin_of


@dataclass(frozen=True)
class BatchesSettings:
    """Prints the documents in the batch of a step: shard, document, its tokens, source file and row."""

    run: Path
    """Run folder, RUN/config.toml and RUN/index."""
    step: int
    """Step as metrics.jsonl counts, from 1."""


def documents_of_step(run: Path, step: int) -> list[str]:
    """A line for each part of a document in a step's global batch, in the order of the samples.

    Raises:
        ValueError: The run, its data or the step is not there.
    """
    config = load_run_config(run)
    if not 1 <= step <= config.train.steps:
        raise ValueError(f"--step is {step}; the run has the steps 1 to {config.train.steps}")
    data = open_data(config)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    samples, _ = open_samples(config, data, run)
    portion = portion_of(step, config.train)
    samples.prepare(portion.first, portion.first + portion.samples - 1)
    return documents_of(samples, data, portion)


def documents_of(samples: NumberedSamples, data: RunData, portion: Portion) -> list[str]:
    """The same of samples that are open already."""
    manifests = {folder.path.resolve(): folder.manifest for folder in data.folders}
    lines = []
    for index in range(portion.first, portion.first + portion.samples):
        for part in samples.documents(index):
            source, row = origin_of(manifests[part.prefix.parent], part.prefix, part.document)
            shard = part.prefix.name if len(manifests) == 1 else part.prefix
            lines.append(
                f"sample {index}: {shard} document {part.document} tokens {part.start} to "
                f"{part.stop - 1}, {source} row {row}"
            )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; see `--help`."""
    settings = tyro.cli(BatchesSettings, args=arguments, prog="python -m pretrain.data.batch_documents")
    try:
        print("\n".join(documents_of_step(settings.run, settings.step)))
    except (ValueError, OSError) as fault:
        raise TokenizationError(str(fault)) from fault
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)

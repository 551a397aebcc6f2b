"""`python -m evals.efficiency memory --output DIR`; one sub-command for each thing that is measured."""

import sys
from collections.abc import Callable, Sequence

from evals.command_line import EvaluationError, parse_settings, run_command
from evals.efficiency import ContextSettings, MemorySettings

_HELP = """usage: python -m evals.efficiency COMMAND [OPTIONS]

Measures speed and memory.

commands:
  memory   the neural memory: tokens/s and peak memory, beside titans-pytorch
  context  reading, decoding and memory of trained models, up to millions of tokens
  gpu      all that needs a GPU, in three parts of a few minutes: right, fast, endurance

`python -m evals.efficiency COMMAND --help` lists the options."""


def _memory(words: Sequence[str]) -> None:
    settings = parse_settings(MemorySettings, "python -m evals.efficiency memory", words)
    from evals.efficiency.memory import measure

    print(measure(settings))
    print(f"{settings.output / 'memory.json'}, .md", file=sys.stderr)


def _context(words: Sequence[str]) -> None:
    settings = parse_settings(ContextSettings, "python -m evals.efficiency context", words)
    from evals.efficiency.context import measure

    print(measure(settings))
    print(settings.json, file=sys.stderr)


def _gpu(words: Sequence[str]) -> None:
    from evals.efficiency.gpu import GpuSettings, measure

    settings = parse_settings(GpuSettings, "python -m evals.efficiency gpu", words)
    sys.exit(measure(settings))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"memory": _memory, "context": _context, "gpu": _gpu}


def main() -> None:
    """Runs the command line; see `--help`."""
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(_HELP)
        return
    if command not in COMMANDS:
        raise EvaluationError(f"there is no command {command!r}; give one of {', '.join(COMMANDS)}")
    COMMANDS[command](words)


if __name__ == "__main__":
    run_command(main)

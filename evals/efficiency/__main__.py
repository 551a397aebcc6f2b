"""`python -m evals.efficiency memory --output DIR`; one sub-command for each thing that is measured."""

import sys
from collections.abc import Callable, Sequence

from evals.command_line import EXIT_INTERRUPTED, EvaluationError, parse_settings, run_command
from evals.efficiency import ContextSettings, MemorySettings

_HELP = """usage: python -m evals.efficiency COMMAND [OPTIONS]

Measures speed and memory.

commands:
  memory   the neural memory: tokens/s and peak memory, beside titans-pytorch
  context  reading, decoding and memory of trained models, up to millions of tokens
  faults   what lost processes cost a run: productive time, lost steps, time to resume
  gpu      all that needs a GPU, in three parts of a few minutes: right, fast, endurance

`python -m evals.efficiency COMMAND --help` lists the options."""


def _memory(words: Sequence[str]) -> None:
    settings = parse_settings(MemorySettings, "python -m evals.efficiency memory", words)
    from evals.efficiency.memory import measure

    try:
        print(measure(settings))
    except KeyboardInterrupt:
        print(f"\ninterrupted; what is finished stands in {settings.output}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    for path in (settings.output / "memory.json", settings.output / "memory.md"):
        print(path, file=sys.stderr)


def _context(words: Sequence[str]) -> None:
    settings = parse_settings(ContextSettings, "python -m evals.efficiency context", words)
    from evals.efficiency.context import measure

    print(measure(settings))
    print(settings.json, file=sys.stderr)


def _faults(words: Sequence[str]) -> None:
    from evals.efficiency.faults import FaultSettings, measure

    settings = parse_settings(FaultSettings, "python -m evals.efficiency faults", words)
    try:
        print(measure(settings))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was measured", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(settings.output / "faults.json", file=sys.stderr)


def _gpu(words: Sequence[str]) -> None:
    from evals.efficiency.gpu import GpuSettings, measure

    settings = parse_settings(GpuSettings, "python -m evals.efficiency gpu", words)
    try:
        status = measure(settings)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found stands in {settings.output}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(status)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "memory": _memory,
    "context": _context,
    "faults": _faults,
    "gpu": _gpu,
}


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

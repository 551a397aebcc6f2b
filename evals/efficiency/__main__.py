"""`python -m evals.efficiency memory --output DIR`; one sub-command for each thing that is measured."""

import sys

from evals.command_line import EvaluationError, parse_settings, run_command
from evals.efficiency import ContextSettings, MemorySettings

_HELP = """usage: python -m evals.efficiency COMMAND [OPTIONS]

Measures speed and memory.

commands:
  memory   the neural memory: tokens/s and peak memory, beside titans-pytorch
  context  reading, decoding and memory of trained models, up to millions of tokens
  gpu      all that needs a GPU, in three parts of a few minutes: right, fast, endurance

`python -m evals.efficiency COMMAND --help` lists the options."""


def main() -> None:
    """Runs the command line; see `--help`."""
    command, *words = sys.argv[1:] or ["--help"]
    program = f"python -m evals.efficiency {command}"
    if command in ("-h", "--help"):
        print(_HELP)
    elif command == "memory":
        settings = parse_settings(MemorySettings, program, words)
        from evals.efficiency import memory

        print(memory.measure(settings))
        print(f"{settings.output / 'memory.json'}, .md", file=sys.stderr)
    elif command == "context":
        asked = parse_settings(ContextSettings, program, words)
        from evals.efficiency import context

        print(context.measure(asked))
        print(asked.json, file=sys.stderr)
    elif command == "gpu":
        from evals.efficiency import gpu

        sys.exit(gpu.measure(parse_settings(gpu.GpuSettings, program, words)))
    else:
        raise EvaluationError(f"there is no command {command!r}; give one of memory, context, gpu")


if __name__ == "__main__":
    run_command(main)

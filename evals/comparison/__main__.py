"""`python -m evals.comparison --data SHARDS --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.comparison import SystemsComparisonSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(SystemsComparisonSettings, "python -m evals.comparison")
    from evals.comparison.run import compare

    print(compare(settings))


if __name__ == "__main__":
    run_command(main)

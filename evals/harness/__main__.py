"""`python -m evals.harness --checkpoint RUN --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.harness import HarnessSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(HarnessSettings, "python -m evals.harness")
    from evals.harness.run import evaluate, report_table

    print(report_table(evaluate(settings)))
    print(f"{settings.output / 'harness.json'}, harness.md")


if __name__ == "__main__":
    run_command(main)

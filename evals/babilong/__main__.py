"""`python -m evals.babilong --checkpoint RUN --output DIR`."""

from evals.babilong import BabilongSettings
from evals.command_line import parse_settings, run_command


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(BabilongSettings, "python -m evals.babilong")
    from evals.babilong.run import evaluate
    from evals.babilong.summary import report_table

    print(report_table(evaluate(settings.load(), settings)))
    print(f"{settings.output / 'babilong.json'}, babilong.md, babilong.png, babilong.jsonl")


if __name__ == "__main__":
    run_command(main)

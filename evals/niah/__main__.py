"""`python -m evals.niah --checkpoint RUN --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.niah import NiahSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(NiahSettings, "python -m evals.niah")
    from evals.niah.run import evaluate
    from evals.niah.summary import FILES, HEADER, table_rows
    from evals.report import table

    report = evaluate(settings.load(spread=True), settings)
    if report is not None:
        print(table(HEADER, table_rows(report)))
        print(f"{settings.output}: {', '.join(FILES)}")


if __name__ == "__main__":
    run_command(main)

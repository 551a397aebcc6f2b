"""`python -m evals.paper --models mac=runs/mac lmm=runs/lmm --output DIR`."""

from evals.command_line import EvaluationError, parse_settings, run_command
from evals.paper import PaperSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(PaperSettings, "python -m evals.paper")
    from evals.paper.results import run_missing
    from evals.paper.run import write_tables

    failed = run_missing(settings) if settings.run else []
    for table in write_tables(settings):
        print(table.markdown() + "\n")
    print(f"{settings.output / 'paper.md'}, paper.json and plots")
    if failed:
        raise EvaluationError(f"{'; '.join(failed)}; their cells are empty, the lines above say why")


if __name__ == "__main__":
    run_command(main)

"""`python -m evals.paper --models mac=runs/mac lmm=runs/lmm --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.paper import PaperSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(PaperSettings, "python -m evals.paper")
    from evals.paper.tables import write_tables

    for table in write_tables(settings):
        print(table.markdown() + "\n")
    print(settings.output / "paper.md")


if __name__ == "__main__":
    run_command(main)

"""`python -m evals.genomics --data GUE/prom/prom_core_tata --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.genomics import GenomicsSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(GenomicsSettings, "python -m evals.genomics")
    from evals.genomics.run import compare

    print(compare(settings))


if __name__ == "__main__":
    run_command(main)

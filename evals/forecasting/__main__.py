"""`python -m evals.forecasting --data ETTh1.csv --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.forecasting import ForecastingSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(ForecastingSettings, "python -m evals.forecasting")
    from evals.forecasting.run import compare

    print(compare(settings))


if __name__ == "__main__":
    run_command(main)

"""`python -m evals.niah --checkpoint RUN --output DIR`."""

from evals.command_line import parse_settings, run_command
from evals.niah.settings import NiahSettings


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(NiahSettings, "python -m evals.niah")
    from evals.models import load_model
    from evals.niah.run import evaluate
    from evals.niah.summary import summary_table

    report = evaluate(load_model(settings.checkpoint, settings.tokenizer), settings)
    print(summary_table(report))
    print(f"{settings.output / 'niah.json'}, niah.png, niah.jsonl")


if __name__ == "__main__":
    run_command(main)

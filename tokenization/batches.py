"""Which documents a training step learned from: `python -m tokenization.batches --run DIR --step N`.

The order of the samples is the training's business, so the work is done there; the command stands beside
tokenization.trace, which goes on from a document to its text.
"""

from tokenization.command_line import run_command


def main() -> None:
    """Runs the command line; see `--help`."""
    from pretrain.data.batch_documents import main as print_documents

    print_documents()


if __name__ == "__main__":
    run_command(main)

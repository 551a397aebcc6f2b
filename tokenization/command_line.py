"""What the commands of tokenization refuse; they begin and end as all of the project do."""

from titans_mcore.command_line import CommandError, parse_settings, run_command

__all__ = ["parse_settings", "run_command"]

MOST_WORKERS = 4_096


class TokenizationError(CommandError):
    """Of text, tokenizer or shards."""


def check_range(option: str, value: float, least: float, most: float) -> None:
    """Refuses a number that nothing here is made for.

    Raises:
        TokenizationError: It is smaller or larger, or none.
    """
    if not least <= value <= most:
        raise TokenizationError(f"{option} is {value}; give {least:,} to {most:,}")

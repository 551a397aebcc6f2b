"""Keys and tokens of the environment, which no report may show."""

import os
import re

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user:password@host
_SHORTEST = 8  # a shorter value is a word, not a secret


def without_secrets(text: str) -> str:
    """The text with *** for the values of variables like WANDB_API_KEY or HF_TOKEN, and for passwords in addresses."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _IN_ADDRESS.sub("***", text)

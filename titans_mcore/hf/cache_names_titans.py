"""The two names of a model's cache, and all that depends on which of them transformers has.

transformers 5.24 renamed `past_key_values`, an argument of models and a field of their outputs, to `cache`. With every
version, Titans models take either name, and what they return answers to both.
"""

from dataclasses import fields
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")


def cache_field(output: type) -> str:
    """The name that a class of outputs, and so the transformers that it is from, has for the cache."""
    return next(field.name for field in fields(output) if field.name in CACHE_NAMES)


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """What came under one of the names, None when nothing did.

    Raises:
        ValueError: Something came under both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument, and both are given; leave one out")
    return past_key_values if cache is None else cache


class CacheByBothNames:
    """Gives an output of an older transformers the newer name; a newer one answers to the older name itself."""

    def __getattr__(self, name: str) -> Any:
        if name == "cache":
            return self.past_key_values
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

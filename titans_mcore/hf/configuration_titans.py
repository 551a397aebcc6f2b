"""The settings of an exported Titans model, as transformers saves and loads them."""

import re
from dataclasses import fields
from typing import Any

import transformers
from transformers import PretrainedConfig

from ..config import TitansConfig

OLDEST = "4.57"


def check_transformers(version: str) -> None:
    """Whether this version of transformers can run the model.

    Raises:
        ImportError: It is too old.
    """
    if [int(part) for part in re.findall(r"\d+", version)[:2]] < [int(part) for part in OLDEST.split(".")]:
        raise ImportError(
            f"Titans models need transformers {OLDEST} or later, and this is {version}; "
            f'pip install --upgrade "transformers>={OLDEST}"'
        )


check_transformers(transformers.__version__)  # before the modelling code asks for what older versions do not have

# transformers 5.24 renamed past_key_values, an argument of models and a field of their outputs. With every version
# Titans models take either name, and what they return answers to both.
CACHE_NAMES = ("cache", "past_key_values")


class TitansHFConfig(PretrainedConfig):
    """TitansConfig's settings under their own names, with transformers' names for those that it asks for.

    Args:
        **kwargs: Settings of TitansConfig, each optional, and what every PretrainedConfig takes.

    Raises:
        ValueError: The settings do not fit together.
    """

    model_type = "titans"
    keys_to_ignore_at_inference = list(CACHE_NAMES)  # noqa: RUF012 - Trainer adds a list to it
    # transformers stores whether embeddings are tied itself, so that name is the stored one.
    attribute_map = {  # noqa: RUF012 - the base class declares it so
        "tie_embeddings": "tie_word_embeddings",
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
    }

    def __init__(self, **kwargs: Any) -> None:
        for names in self.attribute_map.items():
            ours, theirs = names if names[0] in _NAMES else names[::-1]
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        settings = {name: kwargs.pop(name) for name in _NAMES if name in kwargs}
        settings = TitansConfig(**settings).to_dict()
        self.use_cache = kwargs.pop("use_cache", True)
        kwargs["tie_word_embeddings"] = settings.pop("tie_embeddings")
        super().__init__(**kwargs)
        for name, value in settings.items():
            setattr(self, name, value)

    @classmethod
    def from_titans(cls, config: TitansConfig, **kwargs: Any) -> "TitansHFConfig":
        """The same settings for transformers; kwargs are further settings of PretrainedConfig."""
        return cls(**config.to_dict(), **kwargs)

    def to_titans(self) -> TitansConfig:
        """The settings that the model's modules read.

        Raises:
            ValueError: They do not fit together (any more: a configuration can be changed after it was made).
        """
        return TitansConfig(**{name: getattr(self, name) for name in _NAMES})


class TitansTimeSeriesConfig(TitansHFConfig):
    """The settings of a model that forecasts time series: TitansHFConfig's, and these, with PatchTST's names.

    Args:
        context_length: Steps of a window that the model sees.
        prediction_length: Steps behind it that are forecast.
        num_input_channels: C.
        patch_length: Steps of a token; 1 is a token a step. Steps at the window's beginning that fill no patch are left
            out, as in PatchTST.
        patch_stride: Steps from token to token.
        channels: apart reads each channel as a sequence of its own, with the same weights; together reads all channels
            in each token.
        scaling: std takes off every window's mean and divides by its deviation; revin learns a gain and a shift for
            each channel beside it (RevIN); none does neither.
        frame: What follows the memory in a block: swiglu, or SiMBA's einfft, which is not causal.
        **kwargs: See TitansHFConfig.

    Raises:
        ValueError: The settings do not fit together.
    """

    model_type = "titans_time_series"

    def __init__(
        self,
        context_length: int = 96,
        prediction_length: int = 96,
        num_input_channels: int = 1,
        patch_length: int = 1,
        patch_stride: int = 1,
        channels: str = "apart",
        scaling: str = "std",
        frame: str = "swiglu",
        **kwargs: Any,
    ) -> None:
        own = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        super().__init__(**{"vocab_size": 1} | kwargs)  # there is no vocabulary
        for name, value in own.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
            if name in _SERIES and value not in _SERIES[name]:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(_SERIES[name])}")
            setattr(self, name, value)
        if patch_length > context_length:
            raise ValueError(f"patch_length {patch_length} is longer than context_length {context_length}; shorten it")
        if frame == "einfft" and self.dim % 4:
            raise ValueError(f"dim {self.dim} is not divisible by the 4 blocks of frame einfft; change it")

    @property
    def num_tokens(self) -> int:
        """Tokens of a window."""
        return (self.context_length - self.patch_length) // self.patch_stride + 1

    @property
    def covered(self) -> int:
        """Steps of a window that tokens cover, its last ones."""
        return self.patch_length + (self.num_tokens - 1) * self.patch_stride


_SERIES = {"channels": ("apart", "together"), "scaling": ("std", "revin", "none"), "frame": ("swiglu", "einfft")}
_NAMES = tuple(field.name for field in fields(TitansConfig))


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

"""The token mixers of the four variants and of the baseline: torch only, whole or split as Parts decides."""

from torch import nn

from ..config import TitansConfig
from .mac import MacMixer
from .parts import Parts
from .simple import LmmMixer, MagMixer, MalMixer, TransformerMixer

MIXERS: dict[str, type[nn.Module]] = {
    "mac": MacMixer,
    "mag": MagMixer,
    "mal": MalMixer,
    "lmm": LmmMixer,
    "transformer": TransformerMixer,
}


def make_mixer(config: TitansConfig, parts: Parts) -> nn.Module:
    """The token mixer of config.variant."""
    return MIXERS[config.variant](config, parts)


__all__ = ["MIXERS", "Parts", "make_mixer"]

"""The token mixers of the four variants and of the baseline: torch only, whole or split as Parts decides."""

from torch import nn

from ..config import TitansConfig
from ..memory import TensorTree
from .attention import AttentionState
from .branches import BranchesState
from .lmm import LmmMixer
from .mac import MacMixer, MacState
from .mag import MagMixer
from .mal import MalMixer
from .neural_memory import NeuralMemoryState
from .parts import Parts
from .transformer import TransformerMixer

MIXERS: dict[str, type[nn.Module]] = {
    "mac": MacMixer,
    "mag": MagMixer,
    "mal": MalMixer,
    "lmm": LmmMixer,
    "transformer": TransformerMixer,
}

STATES: dict[str, type[TensorTree]] = {
    "mac": MacState,
    "mag": BranchesState,
    "mal": BranchesState,
    "lmm": NeuralMemoryState,
    "transformer": AttentionState,
}
"""What each variant's mixer carries through time."""


def make_mixer(config: TitansConfig, parts: Parts) -> nn.Module:
    """The token mixer of config.variant."""
    return MIXERS[config.variant](config, parts)


__all__ = ["MIXERS", "STATES", "Parts", "make_mixer"]

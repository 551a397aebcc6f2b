"""The mixers as Megatron-core modules."""

from .parts import MixerSubmodules
from .titans_layer import TitansLayer, TitansLayerSubmodules

__all__ = ["MixerSubmodules", "TitansLayer", "TitansLayerSubmodules"]

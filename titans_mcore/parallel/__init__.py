"""How a model is laid out over processes: groups, Megatron's configuration, and Megatron-core without CUDA."""

import warnings

# Megatron-core looks for these on import and says at length that it does without; so do we, on purpose.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

from titans_mcore.division import check_world, memory_split, padded_vocab_size  # noqa: E402
from titans_mcore.parallel.cpu import enable_cpu  # noqa: E402
from titans_mcore.parallel.groups import (  # noqa: E402
    DeepSpeedGroups,
    Place,
    context_place,
    device,
    local_rank,
    sample_place,
    start,
    stop,
    tighten_timeouts,
)
from titans_mcore.parallel.sequence import reduce_shared_gradients  # noqa: E402
from titans_mcore.parallel.transformer_config import transformer_config  # noqa: E402

__all__ = [
    "DeepSpeedGroups",
    "Place",
    "check_world",
    "context_place",
    "device",
    "enable_cpu",
    "local_rank",
    "memory_split",
    "padded_vocab_size",
    "reduce_shared_gradients",
    "sample_place",
    "start",
    "stop",
    "tighten_timeouts",
    "transformer_config",
]

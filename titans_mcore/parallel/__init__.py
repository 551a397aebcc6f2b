"""How a model is laid out over processes: groups, Megatron's configuration, and Megatron-core without CUDA."""

import warnings

# Megatron-core looks for these on import and says at length that it does without; so do we, on purpose.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

from titans_mcore.parallel.cpu import enable_cpu  # noqa: E402
from titans_mcore.parallel.groups import DeepSpeedGroups, device, local_rank, start, stop  # noqa: E402
from titans_mcore.parallel.transformer_config import padded_vocab_size, transformer_config  # noqa: E402

__all__ = [
    "DeepSpeedGroups",
    "device",
    "enable_cpu",
    "local_rank",
    "padded_vocab_size",
    "start",
    "stop",
    "transformer_config",
]

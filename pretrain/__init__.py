"""Pretraining: data, engine, checkpoints and the loop that uses them."""

import warnings

# Megatron-core looks for these on import and says at length that it does without; so do we, on purpose.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

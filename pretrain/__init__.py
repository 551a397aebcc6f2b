"""Pretraining: train.py is the run from top to bottom, then run.py, engine.py and schedule.py; the rest are rooms."""

import warnings

# Megatron-core looks for these on import and says at length that it does without; so do we, on purpose.
warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")

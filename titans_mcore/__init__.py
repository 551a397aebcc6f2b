"""Titans (arXiv 2501.00663) as Megatron-core modules, with an exact chunked memory and a Hugging Face export."""

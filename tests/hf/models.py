"""Random exported models, for tests that use them as transformers does."""

from typing import Any

import torch
from transformers import GenerationConfig

from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.modeling_titans import TitansForCausalLM

from .hf_runs import tiny


def make(variant: str = "mac", **settings: Any) -> TitansForCausalLM:
    torch.manual_seed(0)
    model = TitansForCausalLM(TitansHFConfig.from_titans(tiny(variant=variant, **settings))).eval()
    model.generation_config = GenerationConfig(bos_token_id=1, pad_token_id=0)
    return model

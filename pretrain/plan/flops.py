"""Floating-point operations of a step; a multiplication and an addition each count one.

dense      2 x the numbers of a matrix for every token that it is applied to: each linear map once to each token, unless
           a mixer says how often, and how often to a persistent token (once for each micro-batch)
attention, memory   what the mixers say of them (titans_mcore/mixers/costs.py)

The backward pass counts twice the forward pass; what is computed a second time to save memory is counted apart, as it
takes time and is no work of the model's. Convolutions, norms and gates are left out: less than a per cent at the sizes
of the paper.
"""

from collections import Counter

from pretrain.config.run_config import RunConfig
from pretrain.plan.parameters import Parameter, inside_block
from titans_mcore.config import TitansConfig
from titans_mcore.parallel import padded_vocab_size


def step_flops(config: RunConfig, parameters: list[Parameter]) -> dict[str, int]:
    """Operations of one optimizer step on all ranks, forward and backward: `total` and by kind."""
    parts = {kind: 3 * flops for kind, flops in _forward(config, parameters).items()}
    return {"total": sum(parts.values()), **parts}


def recomputed_flops(config: RunConfig, parameters: list[Parameter]) -> int:
    """Operations of a step that train.recompute does a second time: the blocks' forward pass, or what it says of it."""
    if config.train.recompute == "none":
        return 0
    forward = _forward(config, parameters)
    if config.train.recompute == "except_memory":
        forward.pop("memory")
    return sum(forward.values()) - head_flops(config.model, config.train.tokens_per_step)


def head_flops(model: TitansConfig, tokens: int) -> int:
    """Operations of the output matrix, forward."""
    return 2 * padded_vocab_size(model.vocab_size) * model.dim * tokens


def _forward(config: RunConfig, parameters: list[Parameter]) -> dict[str, int]:
    """Operations of a step's forward passes, by kind."""
    model, tokens = config.model, config.train.tokens_per_step
    persistent = config.train.global_batch // config.train.micro_batch * model.persistent_tokens
    found = Counter(dense=dense_flops(model, parameters, tokens, persistent), attention=0, memory=0)
    for mixer in model.blocks:
        found.update(mixer.flops(model, config.train.sequence_length, tokens, persistent))
    return dict(found)


def dense_flops(model: TitansConfig, parameters: list[Parameter], tokens: int, persistent: int) -> int:
    """Operations of the matrices outside memory and attention, forward.

    Args:
        model: The model.
        parameters: Its parameters.
        tokens: Tokens of the sequences.
        persistent: Persistent tokens, over all micro-batches.
    """
    total, mixers = head_flops(model, tokens), model.blocks
    for parameter in parameters:
        place = inside_block(parameter.name)
        if place is None or len(parameter.shape) != 2 or not parameter.name.endswith(".weight"):
            continue
        block, matrix = place
        name = matrix.removeprefix("mixer.").removesuffix(".weight")
        by_token, by_persistent = mixers[block].uses.get(name, (1, 0))
        total += 2 * parameter.count * (by_token * tokens + by_persistent * persistent)
    return total

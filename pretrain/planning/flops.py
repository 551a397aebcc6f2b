"""Floating-point operations of a step; a multiplication and an addition each count one.

dense      2 x the numbers of a matrix for every token that it is applied to. `_USES` says how often a mixer applies
           each of its matrices to a token, and to a persistent token (once for each micro-batch); MAC's memory reads
           before the attention and once more behind it.
attention  4 E for every key that a query sees: the product with the key and the weighted sum of the values. Keys are
           counted as the mask lets them be seen, in rows of one document.
memory     for one token, head and weight matrix (m inputs, n outputs), b tokens in a chunk: keys forward 2 m n, error
           back 2 m n (not at the first matrix), read from weights and momentum 4 m n, update of both 4 m n, inside
           the chunk 2 b (m + n). MAC's recall reads once more, 2 m n.

The backward pass counts twice the forward pass; what is computed a second time to save memory is counted apart, as it
takes time and is no work of the model's. Convolutions, norms and gates are left out: less than a per cent at the sizes
of the paper.
"""

import itertools

from pretrain.config import RunConfig
from pretrain.planning.parameters import Parameter
from titans_mcore.config import TitansConfig
from titans_mcore.parallel import padded_vocab_size

_MEMORY = {"mixer.memory.query_gate": (1, 1), "mixer.memory.key_value": (1, 1)}
_ATTENTION = {"mixer.attention.query_key_value": (1, 1), "mixer.output": (1, 0)}
_FEED_FORWARD = {"mlp.linear_fc1": (1, 0), "mlp.linear_fc2": (1, 0)}

# Matrices of a block: how often each is applied to a token, and to a persistent token.
_USES: dict[str, dict[str, tuple[int, int]]] = {
    "transformer": {"mixer.attention.query_key_value": (1, 0), "mixer.output": (1, 0)},
    "lmm": {**_MEMORY, "mixer.output": (1, 0)},
    "mag": {**_MEMORY, **_ATTENTION},
    "mal": {**_MEMORY, **_ATTENTION, "mixer.memory_output": (1, 1)},
    "mac": {
        "mixer.memory.query_gate": (2, 0),
        "mixer.memory.key_value": (1, 0),
        "mixer.memory_output": (2, 0),
        "mixer.query": (1, 0),
        "mixer.key_value": (2, 1),
        "mixer.attention_output": (1, 0),
    },
}


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
    micro_batches = config.train.global_batch // config.train.micro_batch
    persistent = micro_batches * model.persistent_tokens
    keys = mean_visible_keys(model, config.train.sequence_length)
    return {
        "dense": dense_flops(model, parameters, tokens, persistent),
        "attention": int(4 * model.dim * keys * tokens) * model.num_layers,
        "memory": _memory_flops(model, tokens, persistent) * model.num_layers,
    }


def dense_flops(model: TitansConfig, parameters: list[Parameter], tokens: int, persistent: int) -> int:
    """Operations of the matrices outside memory and attention, forward.

    Args:
        model: The model.
        parameters: Its parameters.
        tokens: Tokens of the sequences.
        persistent: Persistent tokens, over all micro-batches.
    """
    uses = {**_USES[model.variant], **_FEED_FORWARD}
    total = head_flops(model, tokens)
    for parameter in parameters:
        matrix = parameter.name.removeprefix("layers.").partition(".")[2].removesuffix(".weight")
        by_token, by_persistent = uses.get(matrix, (0, 0))
        total += 2 * parameter.count * (by_token * tokens + by_persistent * persistent)
    return total


def mean_visible_keys(model: TitansConfig, length: int) -> float:
    """Keys that a query sees, on average over a row of one document."""
    if model.variant == "lmm":
        return 0.0
    if model.variant == "mac":
        # Two keys stand at each token of a segment: its own and its recalled memory's.
        whole, rest = divmod(length, model.segment_length)
        segments = [model.segment_length] * whole + ([rest] if rest else [])
        return sum(size * (size + 1) for size in segments) / length + model.persistent_tokens
    window = min(model.window or length, length)
    seen = window * (window + 1) / 2 + (length - window) * window
    return seen / length + (model.persistent_tokens if model.variant != "transformer" else 0)


def memory_flops_per_token(model: TitansConfig) -> int:
    """Operations of one layer's memory that writes and reads a token, forward, all heads."""
    stable, plain = model.memory_rule == "stable", model.memory_network == "plain"
    anchor = 2 if stable and model.memory_forgetting else 0  # what a query meets of M_0
    total, last = 0, model.memory_depth - 1
    for layer, (m, n) in enumerate(itertools.pairwise(model.memory_widths)):
        total += ((12 if layer else 10) + anchor) * m * n + 2 * model.chunk_size * (m + n)
        if stable and plain and layer == last:
            # Each key meets weights, momentum and M_0 instead of the chunk's first weights, and the errors before it.
            total += (2 + anchor) * m * n + 2 * model.chunk_size * (m + n)
    return model.memory_shape.heads * total


def _memory_flops(model: TitansConfig, tokens: int, persistent: int) -> int:
    if model.variant == "transformer":
        return 0
    if model.variant != "mac":
        return (tokens + persistent) * memory_flops_per_token(model)
    recall = model.memory_shape.heads * sum(2 * m * n for m, n in itertools.pairwise(model.memory_widths))
    return tokens * (memory_flops_per_token(model) + recall)

"""Bytes of what the forward pass keeps for the backward pass, and of the largest working set behind it.

An estimate: it counts the tensors that autograd and the memory's own backward pass keep, as the modules' code makes
them. For one token of the T / CP that a rank has of a row, E the width, f = F / TP what it owns of the feed-forward, w
bytes of an activation, 4 of what is computed in float32, t the ranks of sequence parallelism:

    two norms        (3 w + 8) E / t + w E             input in float32, normalised, scaled; what all read is whole
    feed-forward     4 w f                             gate and value, SiLU of the gate, product
    mixer            what each mixer says of its own   titans_mcore/mixers/costs.py, and beside it in a mixer's file
    head             (2 w + 4) E / t and 4 V / TP + w V / TP   final norm; float32 probabilities, logits

A mixer's largest working set is there in one block at a time. Rows are taken to hold two documents where documents are
kept apart; segments are those of rows of one document.

With train.recompute every block keeps its input, w E / t, and the block with most of it at a time has all of the above;
states are those of one block, and one of every block that has received one. except_memory keeps every block's scan: its
states and one more, and queries, keys, values and reads.
"""

from pretrain.config.run_config import RunConfig
from pretrain.plan.layout import Layout, workload_of
from titans_mcore.mixers.costs import FLOAT32
from titans_mcore.parallel import padded_vocab_size


def activation_bytes(config: RunConfig, layout: Layout) -> dict[str, int]:
    """Bytes on a rank, by part."""
    work, model, w = workload_of(config, layout), config.model, layout.bytes_per_weight
    norms = ((3 * w + 2 * FLOAT32) / layout.token_ranks + w) * model.dim
    around = norms + 4 * w * model.ffn_dim / layout.tensor
    blocks, states = _kept_by_blocks(config, layout, around)
    final_norm = (2 * w + FLOAT32) * model.dim / layout.token_ranks
    parts = {
        "activations": work.tokens * (blocks + final_norm),
        "memory_states": states,
        "memory_group_at_work": max(mixer.at_work(work) for mixer in model.mixers),
        "logits": work.tokens * padded_vocab_size(model.vocab_size) / layout.tensor * (FLOAT32 + w),
    }
    return {name: int(size) for name, size in parts.items()}


def _kept_by_blocks(config: RunConfig, layout: Layout, around: float) -> tuple[float, float]:
    """Bytes of all blocks: of a token, `around` in each beside its mixer; of the states."""
    work, mixers, recompute = workload_of(config, layout), config.model.blocks, layout.recompute
    by_token = [around + mixer.kept(work) for mixer in mixers]
    states = [mixer.states_kept(work) for mixer in mixers]
    one_more = sum(mixer.state_bytes(work) for mixer in mixers)
    if recompute == "none":
        return sum(by_token), sum(states)
    inputs = len(mixers) * (layout.bytes_per_weight * config.model.dim / layout.token_ranks)
    if recompute == "block":
        return max(by_token) + inputs, max(states) + (one_more if layout.context > 1 else 0.0)
    return max(by_token) + inputs + sum(mixer.scan_kept(work) for mixer in mixers), sum(states) + one_more

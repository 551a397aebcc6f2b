"""The language model: embedding, blocks, norm, output matrix and loss, on Megatron-core's parallel layers."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import TitansConfig
from .memory import PackedRows
from .memory.checkpoint import keeping_scans
from .mixers.parts import rms_norm
from .parallel import padded_vocab_size
from .parallel.context import ContextRelay, SharedState, with_gradients
from .parallel.parts import ColumnLinear, MegatronParts, MixerSubmodules, RowLinear


@dataclass
class TitansLayerSubmodules:
    """Parts of a block, each a ModuleSpec or a class."""

    input_norm: ModuleSpec | type
    mixer: MixerSubmodules
    pre_mlp_norm: ModuleSpec | type
    mlp: ModuleSpec | type


class TitansLayer(MegatronModule):
    """A block, with Megatron's layout outside: hidden states are (T', B, E).

    T' are all tokens T, or T / TP of them under sequence parallelism.

    Args:
        config: Megatron's configuration.
        submodules: Parts of the block.
        titans_config: The model's settings, which choose the mixer.
        pg_collection: Megatron's process groups.
        block: Which block of the model it is.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TitansLayerSubmodules,
        titans_config: TitansConfig,
        pg_collection: ProcessGroupCollection,
        block: int = 0,
        memory_parallel: str = "heads",
    ) -> None:
        super().__init__(config=config)
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.input_norm = build_module(submodules.input_norm, config=config, hidden_size=size, eps=eps)
        parts = MegatronParts(config, submodules.mixer, titans_config, pg_collection, memory_parallel)
        spec = titans_config.blocks[block]
        self.mixer, self.fronted = spec.module(titans_config, parts), spec.front
        self.pre_mlp_norm = build_module(submodules.pre_mlp_norm, config=config, hidden_size=size, eps=eps)
        self.mlp = build_module(submodules.mlp, config=config, tp_group=pg_collection.tp)

    def forward(self, hidden_states: Tensor, state: Any = None, rows: PackedRows | None = None) -> tuple[Tensor, Any]:
        """Hidden states (T', B, E) and the mixer's state after them.

        Args:
            hidden_states: The piece.
            state: What an earlier piece returned; None begins the sequences.
            rows: Documents and padding of the whole piece, T tokens.
        """
        if self.fronted:
            added, state = self.mixer.get_submodule("front")(hidden_states.transpose(0, 1), state, rows)
            hidden_states = added.transpose(0, 1)
        mixed, state = self.mixer(self.input_norm(hidden_states).transpose(0, 1), state, rows)
        hidden_states = hidden_states + mixed.transpose(0, 1)
        output, _ = self.mlp(self.pre_mlp_norm(hidden_states))
        return hidden_states + output, state


class RMSNorm(nn.Module):
    """RMSNorm over the last axis.

    Args:
        config: Megatron's configuration.
        hidden_size: Width of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # It may see a share of the tokens only: its gradient is then a part too (parallel.sequence).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x normalised, same shape and dtype."""
        return rms_norm(x, self.weight, self.eps)


def titans_layer_spec(config: TitansConfig, block: int = 0, memory_parallel: str = "heads") -> ModuleSpec:
    """Spec of one block; build it with Megatron's configuration and process groups.

    Args:
        config: The model's settings.
        block: Which one, from 0.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
    """
    return ModuleSpec(
        module=TitansLayer,
        params={"titans_config": config, "block": block, "memory_parallel": memory_parallel},
        submodules=TitansLayerSubmodules(
            input_norm=RMSNorm,
            mixer=MixerSubmodules(column=ColumnLinear, row=RowLinear),
            pre_mlp_norm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                params={"ffn_hidden_size": config.ffn_dim},
                submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear),
            ),
        ),
    )


class TitansModel(MegatronModule):
    """A Titans language model, or this tensor-parallel rank's share of it.

    Args:
        config: The model's settings.
        transformer_config: Megatron's, from parallel.transformer_config().
        pg_collection: Megatron's process groups; None takes those that parallel.start() made.
        memory_parallel: What tensor-parallel ranks share of the memory, "heads" or "hidden".
        recompute: What the backward pass computes again: "none", "block" or "except_memory".
        loss_chunk: Tokens whose logits stand at once where losses are asked for; 0: all of them.
    """

    def __init__(
        self,
        config: TitansConfig,
        transformer_config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        memory_parallel: str = "heads",
        recompute: str = "none",
        loss_chunk: int = 0,
    ) -> None:
        super().__init__(config=transformer_config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.titans_config, self.tp_group, self.recompute = config, groups.tp, recompute
        self.loss_chunk = loss_chunk
        context = getattr(groups, "cp", None)
        self.relay = ContextRelay(context) if context is not None and context.size() > 1 else None
        padded = padded_vocab_size(config.vocab_size)
        self.embedding = tensor_parallel.VocabParallelEmbedding(
            padded,
            config.dim,
            init_method=transformer_config.init_method,
            config=transformer_config,
            reduce_scatter_embeddings=transformer_config.sequence_parallel,
            tp_group=groups.tp,
        )
        specs = [titans_layer_spec(config, block, memory_parallel) for block in range(config.num_layers)]
        self.layers = nn.ModuleList(
            build_module(spec, config=transformer_config, pg_collection=groups) for spec in specs
        )
        self.final_norm = RMSNorm(transformer_config, config.dim, config.norm_eps)
        self.output_layer = ColumnLinear(
            config.dim,
            padded,
            config=transformer_config,
            init_method=transformer_config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=config.tie_embeddings,
            tp_group=groups.tp,
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        starts: Tensor | None = None,
        states: list[Any] | None = None,
    ) -> Tensor | tuple[Tensor, list[Any]]:
        """One pass over whole rows, or over this context-parallel rank's part of them.

        Args:
            tokens: (B, T) ids.
            labels: (B, T) ids of the tokens to predict, or None.
            starts: (B, T) bool, tokens that begin a document; memory, convolution and attention begin anew there.
                None if none does.
            states: For rows that go on from pass to pass: what the pass before returned, which gets no gradient; an
                empty list begins. None for rows that are whole. Of ranks that share rows, the first one's count, and
                the last one's are returned to be gone on with.

        Returns:
            With labels the cross-entropy of each token in nats, float32 (B, T); without, the logits (B, T, V). Where
            states were given, a pair of that and the states for the next pass, one a block.
        """
        hidden, after = self._blocks(tokens, states, None if starts is None else PackedRows(starts))
        output = self._whole_logits(self._local_logits(hidden)) if labels is None else self._losses(hidden, labels)
        return output if states is None else (output, [state.carried() for state in after])

    def _losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(B, T). The backward pass computes a chunk's logits again, so that those of one chunk stand at a time."""
        labels = labels.transpose(0, 1).contiguous()
        if not self.loss_chunk:
            return self._losses_of(hidden, labels).transpose(0, 1)
        # Under sequence parallelism a chunk is gathered from every rank's part of the tokens.
        parts = self.tp_group.size() if self.config.sequence_parallel else 1
        labels = labels.unflatten(0, (parts, -1))
        tokens = max(1, self.loss_chunk // (parts * labels.shape[-1]))
        losses = []
        for chunk, wanted in zip(hidden.split(tokens), labels.split(tokens, 1), strict=True):
            found = checkpoint(
                self._losses_of, chunk, wanted.flatten(0, 1), use_reentrant=False, preserve_rng_state=False
            )
            losses.append(found.unflatten(0, (parts, -1)))
        return torch.cat(losses, 1).flatten(0, 1).transpose(0, 1)

    def _losses_of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy (T, B) of hidden states (T or T / TP, B, E)."""
        logits = self._local_logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)

    def stream(
        self, tokens: Tensor, states: list[Any] | None, last: int | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, list[Any]]:
        """The next piece of sequences that go on.

        Args:
            tokens: (B, T) ids that follow those of earlier calls.
            states: What the earlier call returned, one state a block; None begins the sequences.
            last: Give logits for the last so many tokens only; None for all.
            starts: (B, T) bool, tokens that begin a document, as for forward.

        Returns:
            Logits (B, last or T, V), and the states, of constant size whatever has been read (where
            a mixer's attention has a window that is not 0).

        Raises:
            ValueError: Sequence- or context-parallel ranks share the tokens.
        """
        if self.relay is not None or self.config.sequence_parallel:
            raise ValueError("a model that shares tokens over ranks does not read in pieces; build it without")
        hidden, states = self._blocks(tokens, states, None if starts is None else PackedRows(starts))
        return self._whole_logits(self._local_logits(hidden if last is None else hidden[-last:])), states

    def _blocks(self, tokens: Tensor, states: list[Any] | None, rows: PackedRows | None) -> tuple[Tensor, list[Any]]:
        if self.relay is not None:
            self.relay.begin()
        hidden = self.embedding(tokens)
        if not self.config.sequence_parallel:  # else Megatron has made it its layout, (T / TP, B, E)
            hidden = hidden.transpose(0, 1)
        after = []
        for index, (layer, mixer) in enumerate(zip(self.layers, self.titans_config.blocks, strict=True)):
            state = states[index] if states else None
            if self.relay is not None or states is not None:
                hidden = with_gradients(hidden, layer, mixer.beginnings)
            if self.relay is None:
                hidden, state = self._block(layer, hidden, state, rows)
            elif mixer.composes:
                hidden, state = self._block(layer, hidden, SharedState(self.relay, state), rows)
            else:
                state = self.relay.receive(mixer.state, hidden) if self.relay.rank else state
                hidden, state = self._block(layer, hidden, state, rows)
                hidden = self.relay.pass_on(state, hidden)
            after.append(state)
        return self.final_norm(hidden), after

    def _block(self, layer: nn.Module, hidden: Tensor, state: Any, rows: PackedRows | None) -> tuple[Tensor, Any]:
        if self.recompute == "none" or not torch.is_grad_enabled():
            return layer(hidden, state, rows)
        run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a block is random
        if self.recompute == "except_memory":
            return run(layer, hidden, state, rows, context_fn=keeping_scans)
        return run(layer, hidden, state, rows)

    def _local_logits(self, hidden: Tensor) -> Tensor:
        """(T, B, V / TP); the padding of the vocabulary gets no probability."""
        weight = self.embedding.weight if self.titans_config.tie_embeddings else None
        logits, _ = self.output_layer(hidden, weight=weight)
        first = self.tp_group.rank() * logits.shape[-1]
        real = self.titans_config.vocab_size - first
        if real < logits.shape[-1]:
            padding = torch.arange(logits.shape[-1], device=logits.device) >= real
            logits = logits.masked_fill(padding, -math.inf)
        return logits

    def _whole_logits(self, logits: Tensor) -> Tensor:
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
        return whole[..., : self.titans_config.vocab_size].transpose(0, 1)

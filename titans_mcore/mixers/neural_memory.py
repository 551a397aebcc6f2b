"""The long-term memory as a layer: projections, convolution and gates in front of memory_scan, norm and gate behind."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TitansConfig
from ..memory import MemoryState, PackedRows, Probe, TensorTree, memory_read, memory_scan, memory_with_room
from ..memory.checkpoint import kept
from ..memory.rule import initial_weights, step_mass
from .parts import (
    FromParts,
    Parts,
    causal_conv,
    copy_rows,
    heads_of,
    linear,
    next_token_kernels,
    rms_norm,
    unit_silu,
    widened,
    written,
)


@dataclass
class NeuralMemoryState(TensorTree):
    """What the layer carries through time.

    Attributes:
        memory: Weights and momentum after the last token.
        query_tail: The last K - 1 tokens that went into the queries' convolution, (B, K - 1, H, D).
        key_value_tail: Likewise for keys and values, (B, K - 1, H, 2 D), with the gates where these are convolved.
    """

    memory: MemoryState
    query_tail: Tensor
    key_value_tail: Tensor


class NeuralMemory(FromParts):
    """Long-term memory of H heads (paper, sections 3.1 and 4.4), each a network of its own.

    q, k and v are projected, convolved and passed through SiLU, q and k normalised. The gates are functions of the
    token, with config.gate_convolution of the last ones, one for each weight matrix and head. What is read is
    normalised for each head and gated with SiLU; the
    projection back to the model's width belongs to the mixer around.

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        memory = parts.memory
        self.config, self.heads, self.shard = config, memory.heads, memory.shard
        heads, width = config.memory_shape
        self.qg_proj = memory.column(config.dim, width, width)  # a head: query, output gate
        # A head: key, value, and its gates.
        self.kv_gates_proj = memory.column(config.dim, width, width, *gate_widths(config))
        self.begin_recalling()
        query_kernel, key_value_kernel = initial_kernels(config)
        self.query_kernel = memory.per_head(query_kernel)
        self.key_value_kernel = memory.per_head(key_value_kernel)
        self.gate_bias = memory.per_head(initial_gate_bias(config))
        normed = config.memory_network == "residual_norm"
        start = initial_weights(heads, config.memory_widths, residual_norm=normed)
        self.initial_weights = nn.ParameterList(
            [memory.matrix(weight, layer, len(start)) for layer, weight in enumerate(start)]
        )
        self.norm_weight = memory.per_head(torch.ones(heads, width)) if normed else None
        self.norm_bias = memory.per_head(torch.zeros(heads, width)) if normed else None
        self.output_norm = memory.per_head(torch.ones(heads, width))
        self.queries_of, self.keys_values_gates_of, self.gated = queries_of, keys_values_gates_of, gated

    def begin_recalling(self) -> None:
        """Brings initial weights to where config.memory_init wants them: keys get the map of queries."""
        if self.config.memory_init == "next_token":
            copy_rows(self.qg_proj, self.kv_gates_proj, self.heads, self.config.memory_shape.width)

    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        *,
        recall: "Recall | None" = None,
        start: NeuralMemoryState | None = None,
        rows: PackedRows | None = None,
        close: bool = False,
    ) -> tuple[Tensor, "NeuralMemoryState | Recall"]:
        """Write and read every token of x (B, T, E), which is in the tp region (mixers.parts.Parts).

        With `recall` the tokens read a memory that stands still, and nothing is written. Both ways go through forward
        because sharded parameters can be read only here.

        Args:
            x: The piece.
            state: What an earlier piece returned; None begins as `start` says.
            recall: The memory to read.
            start: State of one row in which a document begins; None is the learned initial memory.
            rows: Documents and padding of the piece; padding stands behind the real tokens.
            close: End the last chunk, so that documents may begin in the state.

        Returns:
            (B, T, heads, D) for MemoryParts.merge_heads(), and the state (or the recall) after the last token.
        """
        query, output_gate = heads_of(linear(self.qg_proj, x), self.heads).chunk(2, -1)
        if recall is not None:
            reads, recall = self._recalled(query, recall, rows)
            return self.gated(reads, output_gate, self.output_norm, self.config.norm_eps), recall
        state = _begun(state, start, len(x))
        first = None if start is None else start.query_tail
        queries, query_tail = self._queries(query, None if state is None else state.query_tail, rows, first)
        keys, values, gates, key_value_tail = self._keys_values_gates(x, state, rows, start)
        tokens = queries, keys, values, *self._gates(gates), list(self.initial_weights)
        written(partial(self._steps, gates))
        reads, memory = kept(memory_scan, *tokens, **self._scan_settings(state, start, rows), close=close)
        after = NeuralMemoryState(memory, query_tail, key_value_tail)
        return self.gated(reads, output_gate, self.output_norm, self.config.norm_eps), after

    def with_room(self, state: NeuralMemoryState) -> NeuralMemoryState:
        """See FromParts."""
        query = state.query_tail[:, :0]
        gates = query.new_zeros(*query.shape[:3], sum(gate_widths(self.config)), dtype=state.memory.weights[0].dtype)
        memory = memory_with_room(
            state.memory, query, *self._gates(gates), list(self.initial_weights), **self._learning()
        )
        return NeuralMemoryState(memory, state.query_tail, state.key_value_tail)

    def probe(
        self,
        x: Tensor,
        state: NeuralMemoryState | None,
        probe: Probe,
        *,
        start: NeuralMemoryState | None = None,
        rows: PackedRows | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | list[Tensor]]:
        """Look at what tokens write; nothing is read or kept. To be called where forward() could be, without gradients.

        Args:
            x: As for forward, like state, start and rows.
            probe: Which chunks are looked at.

        Returns:
            theta, eta and alpha of every token, as memory_scan takes them.
        """
        state = _begun(state, start, len(x))
        keys, values, gates, _ = self._keys_values_gates(x, state, rows, start)
        tokens = keys, keys, values, *self._gates(gates), list(self.initial_weights)
        memory_scan(*tokens, **self._scan_settings(state, start, rows), probe=probe)
        return self._gates(gates)

    def _scan_settings(
        self, state: NeuralMemoryState | None, start: NeuralMemoryState | None, rows: PackedRows | None
    ) -> dict[str, Any]:
        """Of memory_scan."""
        return {
            **self._learning(),
            "state": None if state is None else state.memory,
            "start": None if start is None else start.memory,
            "rows": rows,
            "backend": self.config.memory_backend,
        }

    def _recalled(self, query: Tensor, recall: "Recall", rows: PackedRows | None) -> tuple[Tensor, "Recall"]:
        weights = recall.weights
        if weights is None:
            weights = [w.expand(query.shape[0], *w.shape) for w in self.initial_weights]
        if recall.restarts is not None:
            begins = recall.restarts[:, None, None, None]
            weights = [torch.where(begins, w, kept) for w, kept in zip(self.initial_weights, weights, strict=True)]
        queries, tail = self._queries(query, recall.query_tail, rows, None)
        return memory_read(queries, weights, **self._network()), Recall(weights, tail)

    def _queries(
        self, query: Tensor, tail: Tensor | None, rows: PackedRows | None, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return self.queries_of(query, self._tail(query, tail), self.query_kernel, rows, start)

    def _keys_values_gates(
        self, x: Tensor, state: NeuralMemoryState | None, rows: PackedRows | None, start: NeuralMemoryState | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        projected = heads_of(linear(self.kv_gates_proj, x), self.heads)
        channels = self.key_value_kernel.shape[1]
        tail = self._tail(projected[..., :channels], None if state is None else state.key_value_tail)
        first = None if start is None else start.key_value_tail
        return self.keys_values_gates_of(projected, tail, self.key_value_kernel, self.gate_bias, rows, first)

    def _gates(self, gates: Tensor) -> tuple[Tensor, Tensor, Tensor | list[Tensor]]:
        """theta, eta and alpha as memory_scan takes them."""
        theta, eta, alpha = gates.split(gate_widths(self.config), -1)
        if margin := self.config.gate_margin:
            theta, alpha = (F.relu((1.0 + margin) * gate - margin) for gate in (theta, alpha))
        if self.config.memory_alpha == "channel":
            return (
                self.config.theta_max * theta,
                self._for_matrices(eta),
                list(alpha.split(self.config.memory_widths[:-1], -1)),
            )
        return self.config.theta_max * self._for_matrices(theta), self._for_matrices(eta), self._for_matrices(alpha)

    def _steps(self, gates: Tensor) -> Tensor:
        """step_mass before gate_margin cuts theta: what it cuts has no slope, and a gate would stop just closed."""
        theta, eta, _ = gates.split(gate_widths(self.config), -1)
        return step_mass(self.config.theta_max * self._for_matrices(theta), self._for_matrices(eta))

    def _for_matrices(self, gate: Tensor) -> Tensor:
        """A gate for each matrix: shared by all, or 0 where it is switched off."""
        depth = self.config.memory_depth
        return gate.expand(*gate.shape[:-1], depth) if gate.shape[-1] else gate.new_zeros(*gate.shape[:-1], depth)

    def _tail(self, x: Tensor, tail: Tensor | None) -> Tensor:
        return x.new_zeros(x.shape[0], self.config.conv_kernel - 1, *x.shape[2:]) if tail is None else tail

    def _learning(self) -> dict[str, Any]:
        return {
            **self._network(),
            "rule": self.config.memory_rule,
            "forgets": self.config.memory_forgetting,
            "chunk_size": self.config.chunk_size,
        }

    def _network(self) -> dict[str, Any]:
        return {
            "shard": self.shard,
            "network": self.config.memory_network,
            "norm_weight": self.norm_weight,
            "norm_bias": self.norm_bias,
        }


def queries_of(
    query: Tensor, tail: Tensor, kernel: Tensor, rows: PackedRows | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries (B, T, H, D) of what causal_conv takes, and its tail."""
    query, tail = causal_conv(query, tail, kernel, rows, start)
    return unit_silu(query), tail


def keys_values_gates_of(
    projected: Tensor, tail: Tensor, kernel: Tensor, gate_bias: Tensor, rows: PackedRows | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values (B, T, H, D), gates (B, T, H, F) in (0, 1), and the tail of the channels that are convolved."""
    convolved, gates = projected.split([kernel.shape[1], projected.shape[-1] - kernel.shape[1]], -1)
    convolved, tail = causal_conv(convolved, tail, kernel, rows, start)
    if not gates.shape[-1]:  # they are convolved as well
        convolved, gates = convolved.split([kernel.shape[1] - gate_bias.shape[1], gate_bias.shape[1]], -1)
    keys, values = convolved.chunk(2, -1)
    # Gates are close to 0 or 1 where they matter; a half-precision sigmoid would round them there.
    return unit_silu(keys), F.silu(values), torch.sigmoid(widened(gates) + widened(gate_bias)), tail


def gated(reads: Tensor, output_gate: Tensor, scale: Tensor, eps: float) -> Tensor:
    """What is read, normalised for each head and gated, (B, T, H, D)."""
    return rms_norm(reads, scale, eps) * F.silu(output_gate)


@dataclass
class Recall(TensorTree):
    """A memory that is read and not written.

    Attributes:
        weights: L of (B, H, d_in, d_out); None is the learned initial memory.
        query_tail: The last K - 1 tokens that went into the queries' convolution; None at the start of a sequence.
        restarts: Rows (B,) bool that begin a document now and read the learned initial memory; None for none.
    """

    weights: list[Tensor] | None = None
    query_tail: Tensor | None = None
    restarts: Tensor | None = None


def _begun(state: NeuralMemoryState | None, start: NeuralMemoryState | None, batch: int) -> NeuralMemoryState | None:
    """The state that a piece goes on from; None is the learned initial memory."""
    if state is not None or start is None:
        return state
    return start.map(lambda part: part.expand(batch, *part.shape[1:]))


def gate_widths(config: TitansConfig) -> list[int]:
    """Numbers that theta, eta and alpha have for a head."""
    sets = config.memory_depth if config.memory_gates == "matrix" else 1
    alphas = sum(config.memory_widths[:-1]) if config.memory_alpha == "channel" else sets
    return [sets, sets * config.memory_momentum, alphas * config.memory_forgetting]


def initial_kernels(config: TitansConfig) -> tuple[Tensor, Tensor]:
    """Convolutions before training, of queries (H, D, K), and of keys and values (H, 2 D, K), maybe with gates behind.

    Gates begin as the token's own, and queries, keys and values of the memory_init random close to it: an LMM whose
    kernels were random all through ended 0.10 to 0.12 nats a token behind one without convolution (evals/results).
    """
    (heads, width), taps = config.memory_shape, config.conv_kernel
    gates = torch.zeros(heads, config.gate_convolution * sum(gate_widths(config)), taps)
    gates[..., -1] = 1.0
    if config.memory_init == "random":
        kernels = torch.randn(heads, 3 * width, taps) * (0.3 / math.sqrt(taps))
        kernels[..., -1] = 1.0
    else:
        kernels = next_token_kernels(heads, width, width, taps)
    query, key_value = kernels.split([width, 2 * width], 1)
    return query, torch.cat([key_value, gates], 1)


def initial_gate_bias(config: TitansConfig) -> Tensor:
    """Biases (H, gates) of theta, eta and alpha: where the gates stand before training.

    Steps start at a tenth of theta_max and momentum lasts two tokens. Forgetting is spread over the heads, from a
    horizon of about 30 tokens to one of about 3,000, so that some heads hold on from the first step of training.
    """
    heads, (thetas, etas, alphas) = config.memory_shape.heads, gate_widths(config)
    theta = torch.full((heads, thetas), -2.2)
    alpha = torch.linspace(-3.5, -8.0, heads).unsqueeze(-1).expand(heads, alphas)
    if margin := config.gate_margin:  # they begin at the same gates, all of them open
        theta, alpha = (torch.logit((torch.sigmoid(bias) + margin) / (1.0 + margin)) for bias in (theta, alpha))
    return torch.cat([theta, torch.zeros(heads, etas), alpha], -1)


BEGINNINGS = ("persistent.tokens", "memory.initial_weights.")


class PersistentTokens(FromParts):
    """N learned, input-independent tokens in front of a sequence (paper, section 3.3).

    Args:
        config: The model's settings.
        parts: Makes the parameters.
    """

    tokens: Tensor

    def __init__(self, config: TitansConfig, parts: Parts) -> None:
        super().__init__()
        # They stand beside normalised activations, so they start at their size.
        tokens = parts.replicated(torch.randn(config.persistent_tokens, config.dim))
        if len(tokens):
            self.tokens = tokens
        else:
            self.register_buffer("tokens", tokens.data)  # DeepSpeed takes no parameter without elements

    def forward(self, x: Tensor) -> Tensor | None:
        """(1, N, E) in the dtype of x; None if there are none."""
        return self.tokens.to(x.dtype).unsqueeze(0) if len(self.tokens) else None


def combine(y: Tensor, m: Tensor) -> Tensor:
    """The paper's y (x) m for sides that are normalised with learned scales: each gates the other through a sigmoid.

    With one sigmoid alone, y * sigmoid(m), what the memory answers reaches the output only times y, whose sign is as
    good as random before training: the quickstart's MAG ends at 4.52 nats instead of 3.97.
    """
    return y * torch.sigmoid(m) + m * torch.sigmoid(y)

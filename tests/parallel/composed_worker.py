"""Run under torchrun by test_composed, four processes: ranks that share rows of linear recurrences against one process.

python -m tests.parallel.composed_worker OUTPUT.json

Writes, by variant, layout and kind of rows, the largest error of each tensor over the tensor's largest value (float64),
and by variant in which order the second of four ranks scans tokens, sends and takes messages. Some ranks are held up
while others do what they are said not to wait for: who waits all the same runs into the timeout.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.linear import scan, selective
from titans_mcore.memory import PackedRows
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.parallel.context import ContextRelay, SharedPart
from titans_mcore.tensor_files import split_of

from .layouts_worker import gather, joined, parts_of
from .regroup import groups_of

LINEAR = [name for name, mixer in MIXERS.items() if mixer.composes]
VARIANTS = [*LINEAR, "mamba+transformer"]
# tensor, context, recompute: which variants, and which kinds of rows.
LAYOUTS: dict[tuple[int, int, str], tuple[list[str], list[str]]] = {
    (1, 4, "none"): (VARIANTS, []),
    (1, 4, "block"): (["gated_deltanet"], []),
    (1, 2, "none"): (VARIANTS, ["documents", "going on"]),
    (2, 2, "none"): (["mamba2"], []),
}
BATCH, LENGTH, SHORT = 2, 64, 8  # parts of 16 tokens on four ranks, and of 2, fewer than a convolution's tail
SETTINGS: dict[str, Any] = {"vocab_size": 50, "num_layers": 2, "dim": 16, "num_heads": 2, "linear_heads": 2}
SETTINGS |= {"ffn_dim": 16, "window": 5, "init_std": 0.3}


class Rows(NamedTuple):
    """Tokens that are read, which begin documents or are padding, and whether they go on from earlier ones."""

    tokens: Tensor
    starts: Tensor | None = None
    real: Tensor | None = None
    earlier: Tensor | None = None

    def part(self, rank: int, ranks: int) -> "Rows":
        tokens, starts, real = (None if x is None else x.chunk(ranks, 1)[rank] for x in self[:3])
        starts = starts if starts is not None and bool(starts.any()) else None
        return Rows(tokens, starts, real, self.earlier)

    @property
    def packed(self) -> PackedRows | None:
        return None if self.starts is None and self.real is None else PackedRows(self.starts, self.real)


def kinds() -> dict[str, Rows]:
    """Rows of every kind."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> Tensor:
        return torch.randint(0, SETTINGS["vocab_size"], (BATCH, length), generator=generator)

    starts = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    starts[0, [5, 16, 31, 47]] = True  # inside a part, first and last of one; the last document goes over a border
    starts[1, 34] = True  # the others go over two borders
    real = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    real[0, 49:] = real[1, 24:] = False  # one token on the last rank; none on the last two
    return {
        "whole": Rows(tokens(LENGTH)),
        "documents": Rows(tokens(LENGTH), starts),
        "padding": Rows(tokens(LENGTH), starts & real, real),
        "padding alone": Rows(tokens(LENGTH), None, real),
        "going on": Rows(tokens(LENGTH), starts, None, tokens(7)),
        "short": Rows(tokens(SHORT), None, None, tokens(7)),
    }


def model_of(variant: str, tensor: int, context: int, recompute: str) -> TitansModel:
    config = TitansConfig(variant=variant, **SETTINGS)
    torch.manual_seed(0)
    megatron = transformer_config(config, tensor_parallel=tensor, dtype=torch.float64)
    return TitansModel(config, megatron, groups_of(tensor, context), recompute=recompute)


def run(model: TitansModel, rows: Rows, weights: Tensor, earlier: list[Any] | None) -> dict[str, Tensor]:
    """Logits, loss, the states behind the rows and all gradients, whole and the same on every rank."""
    tensor_group = model.tp_group
    context = parallel_state.get_context_parallel_group()
    here = rows.part(context.rank(), context.size())
    model.zero_grad()
    hidden, states = model._blocks(here.tokens, earlier, here.packed)
    logits = model._whole_logits(model._local_logits(hidden))
    if here.real is not None:
        logits = logits.masked_fill(~here.real.unsqueeze(-1), 0.0)
    loss = (logits * weights.chunk(context.size(), 1)[context.rank()]).sin().sum()
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total, group=context)
    found = {"logits": gather(logits.detach(), context, 1), "loss": total}
    for block, state in enumerate(states):
        if model.titans_config.blocks[block].composes and tensor_group.size() == 1:
            for name, x in state.state_dict().items():
                found[f"state.{block}.{name}"] = parts_of(x.detach(), context)[-1]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient, group=context)
        rule, parts = split_of(parameter), parts_of(gradient, tensor_group)
        found[name] = parts[0] if rule is None else joined(rule, parts)
    return found


def earlier_states(model: TitansModel, rows: Rows) -> list[Any] | None:
    """What the first rank's rows go on with."""
    if rows.earlier is None or (model.relay is not None and model.relay.rank):
        return None
    relay, model.relay = model.relay, None
    with torch.no_grad():
        _, states = model._blocks(rows.earlier, None, None)
    model.relay = relay
    return [state.carried() for state in states]


def compared() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    weights = torch.randn(BATCH, LENGTH, SETTINGS["vocab_size"], generator=torch.Generator().manual_seed(4)).double()
    wanted: dict[tuple[str, str], dict[str, Tensor]] = {}
    for (tensor, context, recompute), (variants, some) in {(1, 1, "none"): (VARIANTS, []), **LAYOUTS}.items():
        for variant in variants:
            model = model_of(variant, tensor, context, recompute)
            for kind, rows in kinds().items():
                if (some and kind not in some) or (kind == "short" and "transformer" in variant):
                    continue
                these = run(model, rows, weights[:, : rows.tokens.shape[1]], earlier_states(model, rows))
                if context == 1:
                    wanted[variant, kind] = these
                    continue
                right = wanted[variant, kind]
                assert {*these} == {name for name in right if not name.startswith("state.")} | {
                    name for name in right if name.startswith("state.") and tensor == 1
                }
                errors = {name: far(x, right[name]) for name, x in these.items()}
                found[f"{variant} | {tensor} {context} {recompute} | {kind}"] = errors
    return found


def far(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max().clamp_min(1e-300))


def order(variant: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What this one of four ranks does in a step of two blocks: messages and scans; what comes twice stands once."""
    model = model_of(variant, 1, 4, "none")
    rows, noted = kinds()["whole"].part(dist.get_rank(), 4), [""]

    def noting(owner: Any, name: str, what: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def and_noted(*arguments: Any, **named: Any) -> Any:
            if noted[-1] != (now := what(*arguments)):
                noted.append(now)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, and_noted)

    noting(ContextRelay, "_send", lambda relay, _, to, *__: f"send {'right' if to > relay.rank else 'left'}")
    noting(ContextRelay, "_take", lambda relay, _, source: f"take {'left' if source < relay.rank else 'right'}")
    noting(scan, "in_chunks", lambda *_: "scan")
    noting(selective, "_span", lambda *_: "scan")
    model(rows.tokens).sum().backward()
    return noted[1:]


def held_up(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass in which the first rank keeps every layer's state until all ranks have scanned its tokens."""
    model, store = model_of(variant, 1, 4, "none"), dist.distributed_c10d._get_default_store()
    pass_on, receive, scanned = SharedPart.pass_on, SharedPart.receive, Counter[str]()

    def keys(name: str, ranks: Iterable[int]) -> list[str]:
        scanned[name] += 1
        return [f"{variant} {name} {scanned[name]} {rank}" for rank in ranks]

    def late_pass_on(part: SharedPart, state: Tensor, ahead: Tensor) -> Tensor:
        if part.first and part.name == "matrix":
            store.wait(keys(part.name, range(1, 4)), timedelta(seconds=60))
        return pass_on(part, state, ahead)

    def told_receive(part: SharedPart, like: Tensor) -> Tensor:
        if part.name == "matrix":
            store.set(*keys(part.name, [dist.get_rank()]), "scanned")
        return receive(part, like)

    monkeypatch.setattr(SharedPart, "pass_on", late_pass_on)
    monkeypatch.setattr(SharedPart, "receive", told_receive)
    with torch.no_grad():
        model(kinds()["whole"].part(dist.get_rank(), 4).tokens)
    assert scanned["matrix"] == SETTINGS["num_layers"]


def main() -> None:
    torch.set_num_threads(1)
    start(1, seed=0, timeout_seconds=60)
    scan.CHUNK, scan.SPAN = 4, 8
    selective.SELECTIVE_CHUNK, selective.SELECTIVE_SPAN = 4, 8
    found: dict[str, Any] = {"errors": compared(), "order": {}}
    for variant in LINEAR:
        with pytest.MonkeyPatch.context() as monkeypatch:
            orders: list[Any] = [None] * 4
            dist.all_gather_object(orders, order(variant, monkeypatch))
            found["order"][variant] = orders
        with pytest.MonkeyPatch.context() as monkeypatch:
            held_up(variant, monkeypatch)
    dist.barrier()  # what is on its way may not be lost
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()

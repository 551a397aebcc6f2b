"""TTT's scan in mini-batches is the rule token by token: results, gradients, documents, padding, pieces."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear.naive import ttt_scan_naive
from titans_mcore.linear import ttt, ttt_scan
from titans_mcore.linear.ttt import FastWeights, OpenMiniBatch
from titans_mcore.memory import PackedRows

from ..matrices import every_pair
from .test_linear_scan import LENGTH, REAL, ROWS, STARTS, check, packed

HEADS, WIDTH, HIDDEN, BASE = 3, 6, 10, 100.0
KINDS = {"ttt_linear": [(WIDTH, WIDTH)], "ttt_mlp": [(WIDTH, HIDDEN), (HIDDEN, WIDTH)]}
OPENED = (5, 0)  # tokens that the open mini-batch of each row has
TOKENS = ("queries", "keys", "values", "rates")


@pytest.fixture(autouse=True)
def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of which several make a row, which they do not divide."""
    monkeypatch.setattr(ttt, "TTT_SPAN", 3)


def problem(kind: str, opened: bool = True, length: int = LENGTH) -> dict[str, Any]:
    """Tokens, parameters and a state, of which all have gradients."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    def network(*batch: int) -> list[Tensor]:
        pairs = [
            (random(*batch, HEADS, m, n, scale=0.4), random(*batch, HEADS, 1, n, scale=0.2)) for m, n in KINDS[kind]
        ]
        return list(itertools.chain(*pairs))

    found: dict[str, Any] = {name: random(ROWS, length, HEADS, WIDTH) for name in TOKENS[:3]}
    found["rates"] = random(ROWS, length, HEADS).sigmoid()
    # One place has no weight at all, where the paper holds it at 0.
    found["places"] = (1.0 / torch.arange(1, 17) + random(16, scale=0.05)).index_fill(0, torch.tensor([11]), 0.0)
    found |= {"norm_weight": 1.0 + random(HEADS, WIDTH, scale=0.2), "norm_bias": random(HEADS, WIDTH, scale=0.2)}
    found["weights"] = network()
    found["state"] = FastWeights(network(ROWS))
    if opened:
        sums = [x * torch.tensor(OPENED).clamp_max(1)[:, None, None, None] for x in network(ROWS)]
        found["state"].opened = OpenMiniBatch(sums, torch.tensor(OPENED))
    for x in leaves(found):
        x.requires_grad_()
    return found


def leaves(tokens: dict[str, Any]) -> list[Tensor]:
    """Everything that has a gradient."""
    state = tokens.get("state")
    single = [x for x in tokens.values() if isinstance(x, Tensor)]
    found = [*single, *tokens["weights"], *([] if state is None else state.tensors())]
    return [x for x in found if x.is_floating_point()]


def outcome(state: FastWeights) -> list[Tensor]:
    """A state's tensors; a mini-batch that is not there holds nothing."""
    sums = [torch.zeros_like(x) for x in state.weights] if state.opened is None else state.opened.sums
    return [*state.weights, *sums]


def with_gradients(function: Any, tokens: dict[str, Any], rows: PackedRows | None = None) -> list[Tensor]:
    """What is read of real tokens, the state, and all gradients of a function of both."""
    read, state = function(**tokens, rope_base=BASE, rows=rows)
    if rows is not None and rows.real is not None:
        read = read.masked_fill(~rows.real[..., None, None], 0.0)
    total = read.sin().sum() + torch.stack([x.sin().sum() for x in outcome(state)]).sum()
    gradients = torch.autograd.grad(total, leaves(tokens), allow_unused=True, materialize_grads=True)
    filled = read.new_zeros(ROWS) if state.opened is None else state.opened.filled
    return [read, *outcome(state), filled.double(), *gradients]


@pytest.mark.parametrize("rows", [None, (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("opened", [False, True], ids=["begun", "opened"])
@pytest.mark.parametrize("kind", KINDS)
def test_mini_batches_are_the_rule(kind: str, opened: bool, rows: tuple[bool, bool] | None) -> None:
    tokens, given = problem(kind, opened), None if rows is None else packed(*rows)
    check(with_gradients(ttt_scan, tokens, given), with_gradients(ttt_scan_naive, tokens, given))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 53])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_of_any_length_begins_with_the_learned_weights(kind: str, length: int) -> None:
    tokens = problem(kind, length=length)
    tokens["state"] = None
    check(with_gradients(ttt_scan, tokens), with_gradients(ttt_scan_naive, tokens))


@every_pair(pieces=[[1] * LENGTH, [16] * 3 + [5], [1, 23, 2, 27], [52, 1]], rows=[False, True], kind=KINDS)
def test_pieces_of_any_length_give_one_pass_and_its_gradients(kind: str, rows: bool, pieces: list[int]) -> None:
    given = packed(real=True) if rows else None

    def in_pieces(*, state: FastWeights, rows: PackedRows | None, **named: Any) -> tuple[Tensor, FastWeights]:
        tokens, found = [named.pop(name) for name in TOKENS], []
        masks = (None, None) if rows is None else (rows.starts, rows.real)
        parts = zip(*(x.split(pieces, 1) for x in [*tokens, *(x for x in masks if x is not None)]), strict=True)
        for (*part,) in parts:
            piece = dict(zip(TOKENS, part, strict=False))
            here = PackedRows(*part[4:]) if rows is not None else None
            read, state = ttt_scan(**piece, **named, state=state, rows=here)
            found.append(read)
        return torch.cat(found, 1), state

    tokens = problem(kind)
    check(with_gradients(in_pieces, tokens, given), with_gradients(ttt_scan, tokens, given))


@pytest.mark.parametrize("length", [4, 11, 30])
def test_a_piece_behind_a_state_without_gradients_has_those_of_its_own(length: int) -> None:
    """As a step has that goes on from the one before, also where it ends inside the mini-batch that it begins in."""
    tokens = problem("ttt_mlp", length=length)
    tokens["state"] = tokens["state"].map(lambda x: x[:1].detach())
    tokens |= {name: tokens[name][:1].detach().requires_grad_() for name in TOKENS}
    read, _ = ttt_scan(**tokens, rope_base=BASE)
    expected, _ = ttt_scan_naive(**tokens, rope_base=BASE)
    own = [tokens[name] for name in (*TOKENS, "places", "norm_weight", "norm_bias")]
    check(*(torch.autograd.grad(x.sin().sum(), own) for x in (read, expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_what_it_is_alone_and_padding_neither_writes_nor_counts(kind: str) -> None:
    tokens, rows = problem(kind, opened=False), packed(real=True)
    read, state = ttt_scan(**tokens, rope_base=BASE, rows=rows)
    for row, places in enumerate(STARTS):
        bounds = sorted({0, *places, LENGTH})
        for begin, end in itertools.pairwise(bounds):
            inside = begin + REAL[row, begin:end].nonzero()[:, 0]
            own = tokens | {name: tokens[name][row : row + 1, inside] for name in TOKENS}
            own["state"] = None if begin in places else tokens["state"].map(lambda x, row=row: x[row : row + 1])
            alone, after = ttt_scan(**own, rope_base=BASE)
            check([read[row : row + 1, inside]], [alone])
        check([x[row : row + 1] for x in outcome(state)], outcome(after))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_a_later_token(kind: str) -> None:
    tokens = problem(kind)
    read, _ = ttt_scan(**tokens, rope_base=BASE)
    for position in (0, 10, 11, 15, 16, 40):
        found = torch.autograd.grad(read[:, position].sum(), [tokens[name] for name in TOKENS], retain_graph=True)
        for name, gradient in zip(TOKENS, found, strict=True):
            assert not gradient[:, position + 1 :].any(), name
            assert gradient[:, position].any() or name != "queries"


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_has_one_size_and_an_open_mini_batch_as_much_again(kind: str) -> None:
    tokens, sizes, state = {name: x for name, x in problem(kind).items() if name != "state"}, [], None
    rest = {name: x for name, x in tokens.items() if name not in TOKENS}
    for t in range(48):
        part = {name: tokens[name][:, t : t + 1].detach() for name in TOKENS}
        _, state = ttt_scan(**part, **rest, rope_base=BASE, state=state)
        sizes.append(sum(x.numel() for x in state.tensors()))
    one = HEADS * ROWS * sum(m * n + n for m, n in KINDS[kind])
    assert sizes == ([2 * one + ROWS] * 15 + [one]) * 3


def by_hand(tokens: dict[str, Any], layers: int) -> tuple[list[Tensor], Tensor]:
    """One mini-batch of one row and head, from the paper's formulas with weights as leaves: the weights behind it, and
    what its last token reads.
    """
    q, k = (turned(tokens[name][0, :, 0]) for name in ("queries", "keys"))
    v, r, i = tokens["values"][0, :, 0], tokens["rates"][0, :, 0], tokens["places"]
    gamma, nu = tokens["norm_weight"][0], tokens["norm_bias"][0]
    weights = [w[0].detach().requires_grad_() for w in tokens["weights"]]

    def predicted(net: list[Tensor], x: Tensor) -> Tensor:
        z = x @ net[0] + net[1][0]
        if layers == 2:
            z = torch.nn.functional.gelu(z, approximate="tanh") @ net[2] + net[3][0]
        return (z - z.mean()) / (z.var(correction=0) + 1e-6).sqrt() * gamma + nu

    after = [w.detach().clone() for w in weights]
    for j in range(16):
        loss = 0.5 * (predicted(weights, k[j]) - (v[j] - k[j])).square().sum()
        for w, gradient in zip(after, torch.autograd.grad(loss, weights), strict=True):
            w -= i[15] * r[j] * gradient
    return after, q[15] + predicted(after, q[15])


def turned(x: Tensor) -> Tensor:
    """Rotary positions 0 to 15 of (16, K), pair by pair."""
    half, found = x.shape[-1] // 2, torch.empty_like(x)
    for t, c in itertools.product(range(16), range(half)):
        angle = torch.tensor(t * BASE ** (-2.0 * c / x.shape[-1]), dtype=torch.float64)
        found[t, c] = x[t, c] * angle.cos() - x[t, c + half] * angle.sin()
        found[t, c + half] = x[t, c] * angle.sin() + x[t, c + half] * angle.cos()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_mini_batch_is_a_step_down_the_stated_losses_gradients(kind: str) -> None:
    tokens = {name: x for name, x in problem(kind, length=16).items() if name != "state"}
    read, state = ttt_scan(**tokens, rope_base=BASE)
    after, last = by_hand(
        {name: x.detach() if isinstance(x, Tensor) else x for name, x in tokens.items()}, len(KINDS[kind])
    )
    assert state.opened is None
    check([*(w[0, 0] for w in state.weights), read[0, 15, 0]], [*after, last])
    assert (state.weights[0] - tokens["weights"][0]).abs().max() > 0.1


def test_half_precision_is_computed_in_float32() -> None:
    tokens = problem("ttt_mlp") | {"state": None}
    half = {name: x.detach().bfloat16() if isinstance(x, Tensor) else x for name, x in tokens.items()}
    half["weights"] = [x.detach().bfloat16() for x in tokens["weights"]]
    read, state = ttt_scan(**half, rope_base=BASE)
    single = {name: x.float() if isinstance(x, Tensor) else x for name, x in half.items()}
    wide, expected = ttt_scan(**single | {"weights": [x.float() for x in half["weights"]]}, rope_base=BASE)
    assert (read.dtype, {x.dtype for x in state.weights}) == (torch.bfloat16, {torch.float32})
    check([read, *state.weights], [wide.bfloat16(), *expected.weights], rtol=0, atol=0)


def test_nothing_but_what_came_is_kept_for_the_backward_pass() -> None:
    tokens = problem("ttt_mlp", length=64)
    tokens["state"].opened = None
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ttt_scan(**tokens, rope_base=BASE)
    spans = -(-64 // (16 * ttt.TTT_SPAN))
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    state = sum(x.nbytes for x in tokens["state"].weights)
    assert sum(storages.values()) == sum(x.nbytes for x in leaves(tokens)) + (spans - 1) * state


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"queries": (ROWS, LENGTH, HEADS, 4)}, r"queries has shape \(2, 53, 3, 4\); it must be \(2, 53, 3, 6\)"),
        ({"values": (ROWS, LENGTH, HEADS, 5)}, "heads are 5 wide; rotary positions need an even width"),
        ({"rates": (ROWS, LENGTH)}, r"rates has shape \(2, 53\); it must be \(2, 53, 3\)"),
        ({"places": (8,)}, r"places has shape \(8,\); it must be \(16,\)"),
        ({"norm_bias": (WIDTH,)}, r"norm_bias has shape \(6,\); it must be \(3, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_a_sentence(wrong: dict[str, tuple[int, ...]], sentence: str) -> None:
    tokens = problem("ttt_linear") | {name: torch.zeros(shape) for name, shape in wrong.items()}
    with pytest.raises(ValueError, match=sentence):
        ttt_scan(**tokens, rope_base=BASE)


def test_networks_that_do_not_fit_are_refused_in_a_sentence() -> None:
    tokens = problem("ttt_mlp")
    with pytest.raises(ValueError, match="weights holds 3 tensors; give one or two matrices, each with its bias"):
        ttt_scan(**tokens | {"weights": tokens["weights"][:3]}, rope_base=BASE)
    swapped = [tokens["weights"][i] for i in (2, 3, 0, 1)]
    with pytest.raises(ValueError, match=r"weights\[0\] has shape \(3, 10, 6\); it must be \(3, 6, 6\)"):
        ttt_scan(**tokens | {"weights": swapped}, rope_base=BASE)

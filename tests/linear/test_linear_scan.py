"""The linear recurrence in chunks is that of single tokens: results, gradients, documents, padding, pieces."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear.naive import linear_scan_naive
from titans_mcore.linear import linear_scan, scan
from titans_mcore.memory import PackedRows

ROWS, LENGTH, HEADS, KEYS, VALUES = 2, 53, 4, 5, 7
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
# What RetNet, Mamba2 (whose heads share keys and queries), DeltaNet and Gated DeltaNet are of it.
KINDS = {
    "retnet": {"decay": True},
    "mamba2": {"decay": True, "groups": 2},
    "deltanet": {"beta": True},
    "gated_deltanet": {"decay": True, "beta": True},
}
STARTS = ([3, 20, 21, 52], [0, 16])  # beside, at and away from the borders of chunks and spans
REAL = torch.ones(ROWS, LENGTH, dtype=torch.bool)
REAL[0, [4, 30, 31]] = REAL[1, 40:] = False


@pytest.fixture(autouse=True, params=[(8, 20), (64, 2048)], ids=["chunks", "one-chunk"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and spans of which several make a row that they do not divide, and the real ones."""
    chunk, span = request.param
    monkeypatch.setattr(scan, "CHUNK", chunk)
    monkeypatch.setattr(scan, "SPAN", span)


def problem(kind: str, length: int = LENGTH) -> dict[str, Any]:
    """Tokens and a state, of which all have gradients; decays down to 1e-3 a token, where a chunk's would underflow."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    has, heads = KINDS[kind], KINDS[kind].get("groups", HEADS)
    keys = torch.nn.functional.normalize(random(ROWS, length, heads, KEYS), dim=-1)
    found = {"queries": random(ROWS, length, heads, KEYS), "keys": keys, "values": random(ROWS, length, HEADS, VALUES)}
    if "decay" in has:
        found["log_decay"] = -7.0 * random(ROWS, length, HEADS).square().clamp_max(1.0)
    if "beta" in has:
        found["beta"] = random(ROWS, length, HEADS).sigmoid()
    found["state"] = random(ROWS, HEADS, KEYS, VALUES)
    return {name: x.requires_grad_() for name, x in found.items()}


def packed(starts: bool = True, real: bool = False) -> PackedRows:
    begins = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        begins[row, places] = True
    return PackedRows(begins if starts else None, REAL if real else None)


def with_gradients(function: Any, tokens: dict[str, Any], **named: Any) -> list[Tensor]:
    """What is read of real tokens, the state, and all gradients of a function of both."""
    read, state = function(**tokens, scale=0.3, **named)
    rows = named.get("rows")
    if rows is not None and rows.real is not None:
        read = read.masked_fill(~rows.real[..., None, None], 0.0)
    return [read, state, *torch.autograd.grad(read.sin().sum() + state.sin().sum(), list(tokens.values()))]


def check(found: Iterable[Tensor], expected: Iterable[Tensor], **close: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(close or CLOSE))


@pytest.mark.parametrize("rows", [None, (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_are_the_recurrence(kind: str, rows: tuple[bool, bool] | None) -> None:
    tokens, given = problem(kind), {} if rows is None else {"rows": packed(*rows)}
    check(with_gradients(linear_scan, tokens, **given), with_gradients(linear_scan_naive, tokens, **given))


class Late:
    """A Handover of a state that is there when the tokens have been scanned without it."""

    first, given = False, None

    def __init__(self, state: Tensor) -> None:
        self.state, self.sent = state, torch.empty(0)

    def receive(self, like: Tensor) -> Tensor:
        assert (like.shape, like.dtype, like.requires_grad) == (self.state.shape, self.state.dtype, True)
        return self.state

    def pass_on(self, state: Tensor, ahead: Tensor) -> Tensor:
        self.sent = state
        return ahead


@pytest.mark.parametrize("rows", [None, (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_comes_after_the_tokens_were_scanned_counts_as_if_before(
    kind: str, rows: tuple[bool, bool] | None
) -> None:
    tokens, given = problem(kind), {} if rows is None else {"rows": packed(*rows)}
    if rows is not None and rows[0]:
        given["rows"].starts[1, 0] = False  # a row whose first document goes on

    def late(*, state: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        handover = Late(state)
        read, after = linear_scan(**more, state=handover)
        assert handover.sent is after
        return read, after

    check(with_gradients(late, tokens, **given), with_gradients(linear_scan, tokens, **given))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_begins_with_nothing(kind: str) -> None:
    tokens = problem(kind)
    del tokens["state"]
    check(with_gradients(linear_scan, tokens), with_gradients(linear_scan_naive, tokens))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [8] * 6 + [5], [1, 23, 2, 27], [52, 1]])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_any_length_give_one_pass_and_its_gradients(kind: str, pieces: list[int]) -> None:
    rows = packed(real=True)
    assert rows.starts is not None

    def in_pieces(*, state: Tensor, scale: float, rows: PackedRows, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        names, found = list(tokens), []
        parts = zip(*(x.split(pieces, 1) for x in (*tokens.values(), rows.starts, rows.real)), strict=True)
        for *part, starts, real in parts:
            piece = dict(zip(names, part, strict=True))
            read, state = linear_scan(**piece, scale=scale, state=state, rows=PackedRows(starts, real))
            found.append(read)
        return torch.cat(found, 1), state

    tokens = problem(kind)
    check(with_gradients(in_pieces, tokens, rows=rows), with_gradients(linear_scan, tokens, rows=rows))


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_what_it_is_alone_and_padding_neither_writes_nor_counts(kind: str) -> None:
    tokens, rows = problem(kind), packed(real=True)
    read, state = linear_scan(**tokens, rows=rows)
    for row, places in enumerate(STARTS):
        bounds = sorted({0, *places, LENGTH})
        for begin, end in itertools.pairwise(bounds):
            inside = begin + REAL[row, begin:end].nonzero()[:, 0]
            own = {name: x[row : row + 1, inside] for name, x in tokens.items() if name != "state"}
            own["state"] = None if begin in places else tokens["state"][row : row + 1]
            alone, after = linear_scan(**own)
            check([read[row : row + 1, inside]], [alone])
        check([state[row : row + 1]], [after])


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_a_later_token(kind: str) -> None:
    tokens = problem(kind)
    read, _ = linear_scan(**tokens)
    per_token = {name: x for name, x in tokens.items() if name != "state"}
    for position in (0, 7, 8, 24, 40):
        found = torch.autograd.grad(read[:, position].sum(), list(per_token.values()), retain_graph=True)
        for name, gradient in zip(per_token, found, strict=True):
            assert not gradient[:, position + 1 :].any(), name
        assert found[1][:, position].any()  # of the keys


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_decays_and_keys_stay_finite_in_float32(kind: str) -> None:
    """All is forgotten at once, nothing ever is, or one key comes again and again: states, reads and gradients."""
    for log_decay in (-1e4, -1e-7, 0.0):
        tokens = {name: x.detach().float() for name, x in problem(kind).items()}
        tokens["keys"] = tokens["keys"][:, :1].expand_as(tokens["keys"]).clone()
        if "log_decay" in tokens:
            tokens["log_decay"] = torch.full_like(tokens["log_decay"], log_decay)
        if "beta" in tokens:
            tokens["beta"] = torch.full_like(tokens["beta"], 0.999)
        found = with_gradients(linear_scan, {name: x.requires_grad_() for name, x in tokens.items()})
        assert all(bool(x.isfinite().all()) for x in found)
        wide = {name: x.detach().double().requires_grad_() for name, x in tokens.items()}
        check([x.double() for x in found], with_gradients(linear_scan_naive, wide), rtol=1e-4, atol=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    tokens = {name: x.detach().bfloat16() for name, x in problem("gated_deltanet").items()}
    read, state = linear_scan(**tokens)
    wide, expected = linear_scan(**{name: x.float() for name, x in tokens.items()})
    assert (read.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    check([read, state], [wide.bfloat16(), expected], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_comes_late_is_read_in_float32_too(kind: str) -> None:
    tokens = {name: x.detach().bfloat16() for name, x in problem(kind).items()}
    state = tokens.pop("state").float()
    state = state.requires_grad_()
    tokens["values"].requires_grad_()  # a state that is received has its gradient from one that depends on it
    (late, after), (read, expected) = (linear_scan(**tokens, state=s) for s in (Late(state), state))
    assert (late.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    check([after], [expected], rtol=1e-5, atol=1e-5)
    check([late], [read], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_a_scan_changes_nothing(kind: str) -> None:
    tokens = {name: x.detach().float().requires_grad_() for name, x in problem(kind).items()}
    expected = with_gradients(linear_scan, tokens, rows=packed(real=True))
    with torch.autocast("cpu", torch.bfloat16):
        check(with_gradients(linear_scan, tokens, rows=packed(real=True)), expected, rtol=0, atol=0)


def test_nothing_but_what_came_is_kept_for_the_backward_pass() -> None:
    tokens = problem("gated_deltanet")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_scan(**tokens)
    spans = -(-LENGTH // scan.SPAN)
    assert len(kept) <= 8 * spans
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) == sum(x.nbytes for x in tokens.values()) + (spans - 1) * tokens["state"].nbytes


@pytest.mark.parametrize("kind", ["gated_deltanet", "deltanet"])
def test_transformers_functions_give_the_same(kind: str) -> None:
    """Those of Qwen3-Next, (B, T, H, F) like ours, which compute in float32 and begin with nothing."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    tokens = {name: x.detach().float() for name, x in problem(kind).items() if name != "state"}
    read, state = linear_scan(**tokens, scale=KEYS**-0.5)
    decay = tokens.get("log_decay", torch.zeros(ROWS, LENGTH, HEADS))
    theirs = (tokens["queries"], tokens["keys"], tokens["values"], decay, tokens["beta"])
    for function in (qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule):
        found, last = function(*theirs, initial_state=None, output_final_state=True)
        check([read, state], [found, last], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"queries": (ROWS, LENGTH, HEADS, 6)}, r"queries have shape \(2, 53, 4, 6\), keys \(2, 53, 4, 5\)"),
        ({"values": (ROWS, LENGTH + 1, HEADS, VALUES)}, "make rows and tokens equal"),
        ({"values": (ROWS, LENGTH, 6, VALUES)}, "a multiple of the keys'"),
        ({"values": (ROWS, LENGTH, 8, VALUES)}, "the delta rule got 4 heads of keys for 8 of values"),
        ({"log_decay": (ROWS, LENGTH)}, r"log_decay has shape \(2, 53\); it must be \(2, 53, 4\)"),
        ({"beta": (ROWS, LENGTH, 1)}, r"beta has shape \(2, 53, 1\); it must be \(2, 53, 4\)"),
        ({"state": (ROWS, HEADS, VALUES, KEYS)}, r"state has shape \(2, 4, 7, 5\); it must be \(2, 4, 5, 7\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_a_sentence(wrong: dict[str, tuple[int, ...]], sentence: str) -> None:
    tokens = problem("gated_deltanet") | {name: torch.zeros(shape) for name, shape in wrong.items()}
    with pytest.raises(ValueError, match=sentence):
        linear_scan(**tokens)

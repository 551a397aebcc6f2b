"""Mamba's scan in chunks is the recurrence token by token: results, gradients, documents, padding, pieces."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.linear.naive import selective_scan_naive
from titans_mcore.linear import selective, selective_scan
from titans_mcore.memory import PackedRows

from .test_linear_scan import LENGTH, REAL, ROWS, Late, check, packed

CHANNELS, NUMBERS = 6, 3


@pytest.fixture(autouse=True, params=[(8, 20), (16, 512)], ids=["chunks", "one-span"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and spans of which several make a row that they do not divide, and the real ones."""
    monkeypatch.setattr(selective, "SELECTIVE_CHUNK", request.param[0])
    monkeypatch.setattr(selective, "SELECTIVE_SPAN", request.param[1])


def problem() -> dict[str, Any]:
    """Tokens and a state, of which all have gradients; some decays are 1 and some below 1e-20 a token."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {
        "values": random(ROWS, LENGTH, CHANNELS),
        "steps": random(ROWS, LENGTH, CHANNELS).relu() * 3.0,
        "rates": -16.0 * torch.rand(CHANNELS, NUMBERS, generator=generator, dtype=torch.float64),
        "inputs": random(ROWS, LENGTH, NUMBERS),
        "outputs": random(ROWS, LENGTH, NUMBERS),
        "state": random(ROWS, CHANNELS, NUMBERS),
    }
    return {name: x.requires_grad_() for name, x in found.items()}


def with_gradients(function: Any, tokens: dict[str, Any], rows: PackedRows | None = None) -> list[Tensor]:
    """What is read of real tokens, the state, and all gradients of a function of both."""
    read, state = function(**tokens, rows=rows)
    if rows is not None and rows.real is not None:
        read = read.masked_fill(~rows.real.unsqueeze(-1), 0.0)
    return [read, state, *torch.autograd.grad(read.sin().sum() + state.sin().sum(), list(tokens.values()))]


@pytest.mark.parametrize("rows", [None, (True, False), (False, True), (True, True)])
def test_chunks_are_the_recurrence(rows: tuple[bool, bool] | None) -> None:
    given = None if rows is None else packed(*rows)
    check(with_gradients(selective_scan, problem(), given), with_gradients(selective_scan_naive, problem(), given))


@pytest.mark.parametrize("rows", [None, (True, False), (False, True), (True, True)])
def test_a_state_that_comes_after_the_tokens_were_scanned_counts_as_if_before(rows: tuple[bool, bool] | None) -> None:
    given = None if rows is None else packed(*rows)

    def late(*, state: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return selective_scan(**more, state=Late(state))

    check(with_gradients(late, problem(), given), with_gradients(selective_scan, problem(), given))


@pytest.mark.parametrize("pieces", [[1] * LENGTH, [8] * 6 + [5], [1, 23, 2, 27]])
def test_pieces_of_any_length_give_one_pass_and_its_gradients(pieces: list[int]) -> None:
    def in_pieces(*, state: Tensor, rates: Tensor, rows: PackedRows, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        assert rows.starts is not None
        parts = zip(*(x.split(pieces, 1) for x in (*tokens.values(), rows.starts, REAL)), strict=True)
        for *part, starts, real in parts:
            piece = dict(zip(tokens, part, strict=True))
            read, state = selective_scan(**piece, rates=rates, state=state, rows=PackedRows(starts, real))
            found.append(read)
        return torch.cat(found, 1), state

    rows = packed(real=True)
    check(with_gradients(in_pieces, problem(), rows), with_gradients(selective_scan, problem(), rows))


def test_autocast_around_a_scan_changes_nothing() -> None:
    tokens = {name: x.detach().float().requires_grad_() for name, x in problem().items()}
    expected = with_gradients(selective_scan, tokens, packed(real=True))
    with torch.autocast("cpu", torch.bfloat16):
        check(with_gradients(selective_scan, tokens, packed(real=True)), expected, rtol=0, atol=0)


def test_nothing_but_what_came_is_kept_for_the_backward_pass() -> None:
    tokens = problem()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        selective_scan(**tokens)
    spans = -(-LENGTH // selective.SELECTIVE_SPAN)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert sum(storages.values()) == sum(x.nbytes for x in tokens.values()) + (spans - 1) * tokens["state"].nbytes

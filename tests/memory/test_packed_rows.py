"""Documents packed into rows, and padding: exact, whatever stands beside a document or in front of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titans_mcore.memory import MemoryState, PackedRows, memory_scan

from ..matrices import every_pair
from .streams import Stream, make_stream
from .test_dual_form import largest_difference

LENGTH = 50


def masks(batch: int, length: int, seed: int, *, documents: bool = True, padding: bool = True) -> PackedRows:
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(batch, length, generator=generator) < 0.08 if documents else None
    real = torch.rand(batch, length, generator=generator) < 0.8 if padding else None
    if starts is not None and real is not None:
        starts &= real
    return PackedRows(starts, real)


def piece_of(rows: PackedRows, start: int, stop: int) -> PackedRows:
    return PackedRows(*(None if x is None else x[:, start:stop] for x in (rows.starts, rows.real)))


def first_state(stream: Stream, batch: int) -> MemoryState:
    """Another first state of documents than M_0, as persistent tokens leave one behind."""
    generator = torch.Generator().manual_seed(9)

    def draw(w: torch.Tensor, scale: float) -> torch.Tensor:
        noise = torch.randn(batch, *w.shape, generator=generator, dtype=w.dtype)
        return (w.detach() + scale * noise).requires_grad_()

    return MemoryState([draw(w, 0.3) for w in stream.weights], [draw(0.0 * w, 0.02) for w in stream.weights])


def results(
    stream: Stream, rows: PackedRows, backend: str, pieces: list[int], chunk_size: int = 8
) -> list[torch.Tensor]:
    """Reads, end state and every gradient of a random functional of them."""
    leaves, first = stream.leaves(), first_state(stream, stream.keys.shape[0])
    leaves += [*first.weights, *first.momentum]
    reads, state, start = [], None, 0
    for length in pieces:
        piece = stream.piece(start, start + length)
        read, state = memory_scan(
            *piece.tokens,
            stream.weights,
            **stream.settings,
            chunk_size=chunk_size,
            state=state,
            start=first,
            rows=piece_of(rows, start, start + length),
            backend=backend,
        )
        reads.append(read)
        start += length
    assert state is not None
    outputs = [torch.cat(reads, 1), *state.weights, *state.momentum]
    generator = torch.Generator().manual_seed(1)
    functional = sum((x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in outputs)
    found = torch.autograd.grad(functional, leaves, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True))]


@every_pair(
    theta=[0.05, 2.0],  # 2.0: the step bound acts
    depth=[1, 2, 3],
    network=["residual_norm", "plain"],
    documents__padding=[(True, False), (False, True), (True, True)],
)
def test_packed_rows_are_the_oracles_documents_apart(
    documents: bool, padding: bool, network: str, depth: int, theta: float
) -> None:
    stream = make_stream(LENGTH, depth, network, theta=theta, heads=2, width=4)
    rows = masks(2, LENGTH, depth, documents=documents, padding=padding)
    ours = results(stream, rows, "chunked", [LENGTH])
    assert largest_difference(ours, results(stream, rows, "oracle", [LENGTH])) < 1e-10


@pytest.mark.parametrize("pieces", [[20, 30], [1] * LENGTH, [8, 16, 26], [3, 1, 29, 17]])
@pytest.mark.parametrize("backend", ["chunked", "oracle"])
def test_packed_rows_in_any_pieces_give_one_pass(backend: str, pieces: list[int]) -> None:
    stream, rows = make_stream(LENGTH, 2, heads=2, width=4, batch=3), masks(3, LENGTH, 5)
    whole = results(stream, rows, "oracle", [LENGTH])
    assert largest_difference(results(stream, rows, backend, pieces), whole) < 1e-10


@pytest.mark.parametrize("before", [0, 1, 7, 8, 21])
def test_a_document_is_the_same_wherever_it_stands(before: int) -> None:
    """Its reads and gradients, bit for bit against other neighbours, are those it has alone."""
    document, other = make_stream(29, 2, seed=1), make_stream(before + 10, 2, seed=2)

    def reads_and_gradients(front: int, back: int) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in document.tokens]
        beside = other.tokens
        tokens = [
            torch.cat([b[:, :front], x, b[:, front : front + back]], 1) for b, x in zip(beside, leaves, strict=True)
        ]
        starts = torch.zeros(2, front + 29 + back, dtype=torch.bool)
        starts[:, front] = True
        starts[:, front + 29 :][:, :1] = True
        reads, _ = memory_scan(*tokens, document.weights, **document.settings, chunk_size=8, rows=PackedRows(starts))
        mine = reads[:, front : front + 29]
        return [mine, *torch.autograd.grad(mine.sin().sum(), leaves)]

    assert largest_difference(reads_and_gradients(before, 10), reads_and_gradients(0, 0)) < 1e-12


def test_no_gradient_crosses_a_document_boundary() -> None:
    stream = make_stream(32, 2, theta=1.0)
    stream.leaves()
    starts = torch.zeros(2, 32, dtype=torch.bool)
    starts[:, 13] = True
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8, rows=PackedRows(starts))
    for x in torch.autograd.grad(reads[:, 13:].square().sum(), stream.tokens):
        assert not x[:, :13].any()
        assert x[:, 13:].any()


def test_padding_neither_writes_nor_decays() -> None:
    stream = make_stream(24, 2)
    alone, after = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8)
    garbage = make_stream(40, 2, seed=7, theta=5.0)
    places = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:24].sort().values
    real = torch.zeros(2, 40, dtype=torch.bool)
    real[:, places] = True
    tokens = [g.index_copy(1, places, x) for g, x in zip(garbage.tokens, stream.tokens, strict=True)]
    reads, state = memory_scan(*tokens, stream.weights, **stream.settings, chunk_size=8, rows=PackedRows(real=real))
    torch.testing.assert_close(reads[:, places], alone, rtol=1e-12, atol=1e-12)
    assert not reads[~real].any()
    for a, b in zip((*state.weights, *state.momentum), (*after.weights, *after.momentum), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_empty_slots_give_finite_gradients(depth: int) -> None:
    """In float32 and at the first step of training, when an empty slot has neither key nor error."""
    stream = make_stream(16, depth, dtype=torch.float32, theta=3.0)
    stream.norm = {"norm_weight": torch.ones(3, 6), "norm_bias": torch.zeros(3, 6)}
    leaves, starts = stream.leaves(), torch.zeros(2, 16, dtype=torch.bool)
    starts[0, 5] = True
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8, rows=PackedRows(starts))
    assert all(x.isfinite().all() for x in torch.autograd.grad(reads.square().sum(), leaves))


def test_left_padded_prompts_decode_like_prompts_alone() -> None:
    """Rows of different length in one batch, then a token at a time."""
    stream = make_stream(30, 2, batch=2)
    real = torch.ones(2, 21, dtype=torch.bool)
    real[1, :8] = False
    rows = PackedRows(real=real)
    _, state = memory_scan(*stream.piece(0, 21).tokens, stream.weights, **stream.settings, chunk_size=8, rows=rows)
    reads = []
    for t in range(21, 30):
        read, state = memory_scan(
            *stream.piece(t, t + 1).tokens, stream.weights, **stream.settings, chunk_size=8, state=state
        )
        reads.append(read)
    for row, first in ((0, 0), (1, 8)):
        alone = [x[row : row + 1, first:] for x in stream.tokens]
        expected, _ = memory_scan(*alone, stream.weights, **stream.settings, chunk_size=8)
        torch.testing.assert_close(torch.cat(reads, 1)[row], expected[0, 21 - first :], rtol=1e-10, atol=1e-10)


def test_a_piece_of_padding_alone_changes_nothing() -> None:
    stream = make_stream(20, 1, "plain")
    _, state = memory_scan(*stream.tokens, stream.weights, network="plain", chunk_size=8)
    nothing = PackedRows(real=torch.zeros(2, 20, dtype=torch.bool))
    for rows in (nothing, PackedRows(real=nothing.real.index_fill(0, torch.tensor(1), True))):
        reads, after = memory_scan(
            *stream.tokens, stream.weights, network="plain", chunk_size=8, state=state, rows=rows
        )
        assert not reads[0].any()
        for a, b in zip((*after.weights, *after.momentum), (*state.weights, *state.momentum), strict=True):
            torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), chunk_size=st.sampled_from([1, 3, 8, 64]), cut=st.integers(1, 29))
def test_no_mask_makes_the_chunked_form_differ(seed: int, chunk_size: int, cut: int) -> None:
    stream, rows = make_stream(30, 1, "plain", heads=1, width=3, seed=seed), masks(2, 30, seed)
    ours = results(stream, rows, "chunked", [cut, 30 - cut], chunk_size)
    assert largest_difference(ours, results(stream, rows, "oracle", [30], chunk_size)) < 1e-9


def test_a_state_of_unequal_rows_selects_and_moves() -> None:
    stream, rows = make_stream(21, 2), masks(2, 21, 3, documents=False)
    _, state = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8, rows=rows)
    moved = state.select(torch.tensor([1, 0])).to(torch.float32)
    assert moved.open_chunk is not None
    assert moved.open_chunk.real is not None
    assert moved.open_chunk.real.dtype == torch.bool
    torch.testing.assert_close(moved.weights[0][0].double(), state.weights[0][1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PackedRows(), "need starts, real or both"),
        (lambda: PackedRows(torch.zeros(2, 4)), "must be bool"),
        (lambda: PackedRows(torch.zeros(2, 4).bool(), torch.zeros(2, 5).bool()), "make them equal"),
    ],
)
def test_masks_that_do_not_fit_are_named(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]


def test_a_document_that_begins_with_padding_is_named() -> None:
    stream, starts = make_stream(4, 1), torch.zeros(2, 4).bool()
    starts[1, 2] = True
    with pytest.raises(ValueError, match="token 2 of row 1 begins a document and is padding"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings, rows=PackedRows(starts, ~starts))


def test_rows_of_another_length_are_named() -> None:
    stream = make_stream(4, 1)
    with pytest.raises(ValueError, match=r"rows are for \(2, 5\) tokens; the queries have \(2, 4\)"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings, rows=PackedRows(torch.zeros(2, 5).bool()))

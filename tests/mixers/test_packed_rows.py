"""Documents in packed rows, and padded rows: each as it is alone, in one pass and in pieces, for every variant."""

import itertools

import pytest
import torch

from titans_mcore.memory import PackedRows
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.mac import segments_of

from ..matrices import by_kind
from .test_mixers import LENGTH, inputs, mixer_of

STARTS = ([3, 20, 21, 60], [16, 40])  # of the two rows; segments are 16 tokens, chunks 8, the window 12
SETTINGS = [
    {},
    {"persistent_tokens": 0},
    {"conv_kernel": 1},
    {"gate_convolution": True},
    {"persistent_tokens": 16},
    {"window": 0},
]
# Linear recurrences have no persistent tokens and no window.
ATTENDING = [name for name, mixer in MIXERS.items() if mixer.attention or mixer.memory]
OTHERS = [name for name in MIXERS if name not in ATTENDING]


def packed() -> PackedRows:
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    for row, places in enumerate(STARTS):
        starts[row, places] = True
    return PackedRows(starts)


def documents() -> list[tuple[int, int, int]]:
    """Row, first token and end of each document."""
    found = []
    for row, places in enumerate(STARTS):
        bounds = [0, *places, LENGTH]
        found += [(row, *span) for span in itertools.pairwise(bounds)]
    return found


@pytest.mark.parametrize(
    ("variant", "settings"), [*by_kind(SETTINGS, ATTENDING), *by_kind([{}, {"conv_kernel": 1}], OTHERS)]
)
def test_a_document_in_a_packed_row_is_the_document_alone(variant: str, settings: dict[str, object]) -> None:
    mixer, x = mixer_of(variant, torch.float64, **settings), inputs(torch.float64).requires_grad_()
    output, _ = mixer(x, None, packed())
    (gradient,) = torch.autograd.grad(output.sin().sum(), x)
    for row, start, stop in documents():
        alone = x[row : row + 1, start:stop].detach().requires_grad_()
        expected, _ = mixer(alone, None)
        (of_alone,) = torch.autograd.grad(expected.sin().sum(), alone)
        torch.testing.assert_close(output[row : row + 1, start:stop], expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(gradient[row : row + 1, start:stop], of_alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", MIXERS)
def test_parameters_gradients_of_packed_rows_are_those_of_the_documents(variant: str) -> None:
    mixer, x = mixer_of(variant, torch.float64), inputs(torch.float64)
    parameters = list(mixer.parameters())
    ours = torch.autograd.grad(mixer(x, None, packed())[0].sin().sum(), parameters)
    alone = [mixer(x[row : row + 1, start:stop], None)[0].sin().sum() for row, start, stop in documents()]
    for a, b in zip(ours, torch.autograd.grad(torch.stack(alone).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("variant", "rows"), by_kind([packed(), None]))
def test_a_mixer_learns_under_autocast_what_it_learns_without(variant: str, rows: PackedRows | None) -> None:
    mixer, x = mixer_of(variant), inputs()
    expected, _ = mixer(x, None, rows)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(mixer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = mixer(x, None, rows)
        gradients = torch.autograd.grad(output.float().square().sum(), list(mixer.parameters()))
    for ours, theirs in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (ours - theirs).norm() < 0.2 * theirs.norm()  # bf16 has 8 bits; another function is off by all of it


@pytest.mark.parametrize(("variant", "pieces"), by_kind([[5, 1, 30, 2, 37], [1] * LENGTH, [16] * 4 + [11]]))
def test_packed_rows_in_pieces_give_one_pass(variant: str, pieces: list[int]) -> None:
    mixer, x, rows = mixer_of(variant, torch.float64), inputs(torch.float64), packed()
    assert rows.starts is not None
    state, outputs = None, []
    with torch.no_grad():
        whole = mixer(x, None, rows)[0]
        for piece, starts in zip(x.split(pieces, 1), rows.starts.split(pieces, 1), strict=True):
            output, state = mixer(piece, state, PackedRows(starts))
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("variant", "lengths"), by_kind([(3, 33), (LENGTH, 40), (1, LENGTH), (16, 32)]))
def test_padded_rows_go_on_as_rows_alone(variant: str, lengths: tuple[int, int]) -> None:
    """Two prompts of different length, then more tokens of both."""
    mixer, x = mixer_of(variant, torch.float64), inputs(torch.float64)
    real = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    more = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        first, state = mixer(x.masked_fill(~real.unsqueeze(-1), 7.0), None, PackedRows(real=real))
        second = []
        for piece in more.split([1, 1, 9, 1, 8], 1):
            output, state = mixer(piece, state)
            second.append(output)
        for row, length in enumerate(lengths):
            alone, _ = mixer(torch.cat([x[row, :length], more[row]])[None], None)
            joined = torch.cat([first[row, :length], torch.cat(second, 1)[row]])[None]
            torch.testing.assert_close(joined, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("variant", MIXERS)
def test_every_mixers_state_can_be_saved(variant: str) -> None:
    mixer, x = mixer_of(variant), inputs()
    with torch.no_grad():
        _, state = mixer(x[:, :50], None, PackedRows(packed().starts[:, :50]))  # type: ignore[index]
        expected, _ = mixer(x[:, 50:], state)
        loaded = type(state).from_state_dict({name: part.clone() for name, part in state.state_dict().items()})
        assert torch.equal(mixer(x[:, 50:], loaded)[0], expected)


@pytest.mark.parametrize("variant", MIXERS)
def test_state_of_padded_rows_is_constant_size(variant: str) -> None:
    mixer, x = mixer_of(variant), inputs()
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [50]])
    with torch.no_grad():
        _, state = mixer(x, None, PackedRows(real=real))
        sizes = []
        for _ in range(4):
            _, state = mixer(x[:, :32], state)
            held: list[int] = []
            state.map(lambda tensor, held=held: held.append(tensor.numel()) or tensor)
            sizes.append(sum(held))
    assert sizes[1:] == sizes[:1] * 3


def test_segments_hold_every_token_once_and_no_more_than_a_segment() -> None:
    rows = PackedRows(packed().starts, torch.arange(LENGTH) < torch.tensor([[LENGTH], [50]]))
    seen = torch.zeros(2, LENGTH, dtype=torch.long)
    for segment in segments_of(rows, [5, 0], 16):
        row, token = segment.real.nonzero(as_tuple=True)
        seen[row, segment.places[row, token]] += 1
        assert segment.real.sum(1).max() <= 16
        assert (segment.fill < 16).all()
    assert rows.real is not None
    assert torch.equal(seen, rows.real.long())

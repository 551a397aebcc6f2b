"""A padded batch computes for every row what the row computes alone: logits, gradients, tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.hf.padding_titans import padding_of
from titans_mcore.mixers import MIXERS

from .models import make

LENGTHS = (23, 1, 12, 17)
LONGEST = max(LENGTHS)
PAD = 0


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 330, (1, length), generator=generator) for length in LENGTHS]


def padded(rows: list[Tensor], side: str, padding: int = PAD) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, T), the padding on one side."""

    def widths(row: Tensor) -> tuple[int, int]:
        missing = LONGEST - row.shape[1]
        return (missing, 0) if side == "left" else (0, missing)

    ids = torch.cat([F.pad(row, widths(row), value=padding) for row in rows])
    return ids, torch.cat([F.pad(torch.ones_like(row), widths(row)) for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", MIXERS)
@torch.no_grad()
def test_logits_of_a_padded_batch_are_those_of_the_rows_alone(variant: str, side: str) -> None:
    model, rows = make(variant).double(), prompts()
    ids, mask = padded(rows, side)
    logits = model(ids, attention_mask=mask).logits
    others = model(padded(rows, side, padding=5)[0], attention_mask=mask).logits
    for row, alone in enumerate(rows):
        here = mask[row].bool()
        torch.testing.assert_close(logits[row, here], model(alone).logits[0], rtol=0, atol=1e-9)
        assert torch.equal(logits[row, here], others[row, here])  # what stands in the padding makes no difference


@pytest.mark.parametrize("variant", MIXERS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "pieces"])
@torch.no_grad()
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(variant: str, how: dict[str, Any]) -> None:
    model, rows = make(variant), prompts()
    ids, mask = padded(rows, "left")
    together = model.generate(ids, attention_mask=mask, max_new_tokens=11, do_sample=False, **how)
    how.pop("prefill_chunk_size", None)
    for row, alone in enumerate(rows):
        expected = model.generate(alone, max_new_tokens=11, do_sample=False, **how)
        assert torch.equal(together[row, LONGEST:], expected[0, alone.shape[1] :])


@pytest.mark.parametrize("cut", [3, 8])
@pytest.mark.parametrize("variant", MIXERS)
@torch.no_grad()
def test_a_padded_batch_in_pieces_is_one_pass(variant: str, cut: int) -> None:
    """Some pieces are padding in one row, some in all rows but one."""
    model, rows = make(variant), prompts()[1:]
    ids, mask = padded(rows, "left")
    whole = model(ids, attention_mask=mask).logits
    cache, pieces = None, []
    for start in range(0, LONGEST, cut):
        stop = min(start + cut, LONGEST)
        output = model(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", MIXERS)
def test_gradients_of_a_padded_batch_are_the_sum_of_the_rows(variant: str) -> None:
    model, rows = make(variant).double(), prompts()
    ids, mask = padded(rows, "left")
    together = model(ids, attention_mask=mask, labels=ids, num_items_in_batch=1).loss
    alone = sum(model(row, labels=row, num_items_in_batch=1).loss for row in rows)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(alone, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # the loss itself is fp32


def test_a_mask_of_ones_is_no_padding_and_costs_nothing() -> None:
    hidden = torch.zeros(2, 3, 4)
    assert padding_of(torch.ones(2, 8), hidden, 5) is None
    assert padding_of(None, hidden, 0) is None
    assert padding_of(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), hidden, 1) is None  # padding that was read before
    found = padding_of(torch.tensor([[0, 1, 0], [1, 1, 1]]), hidden, 0)
    assert found is not None
    assert found.order.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert torch.equal(found.to_places(found.to_front(hidden)), hidden)

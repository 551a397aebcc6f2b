"""A padded batch computes for every row what the row computes alone: logits, gradients, tokens."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.hf.padding_titans import padding_of
from titans_mcore.mixers import MIXERS

from ..matrices import ONE_OF_A_KIND
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


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
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
@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
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


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
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
    assert padding_of(torch.ones(2, 8), hidden, 5, {}) is None
    assert padding_of(None, hidden, 0, {}) is None
    assert padding_of(torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), hidden, 1, {}) is None  # padding that was read before
    found = padding_of(torch.tensor([[0, 1, 0], [1, 1, 1]]), hidden, 0, {})
    assert found is not None
    assert found.order.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert torch.equal(found.to_places(found.to_front(hidden)), hidden)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_a_row_of_several_sequences_gives_what_they_give_alone(variant: str) -> None:
    """Logits, loss and gradients, as the collator without padding says where they begin, in each of its ways."""
    from transformers import DataCollatorWithFlattening

    model, rows = make(variant).double(), prompts()
    alone = [model(row, labels=row, num_items_in_batch=1) for row in rows if row.shape[1] > 1]
    parameters = list(model.parameters())
    expected = torch.autograd.grad(sum(output.loss for output in alone), parameters)
    collator = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": row[0].tolist()} for row in rows])
    for name in ("position_ids", "seq_idx", "cu_seq_lens_q"):
        output = model(batch["input_ids"], labels=batch["input_ids"], num_items_in_batch=1, **{name: batch[name]})
        pieces = output.logits.split(list(LENGTHS), 1)
        for piece, one in zip([x for x in pieces if x.shape[1] > 1], alone, strict=True):
            torch.testing.assert_close(piece, one.logits, rtol=0, atol=1e-9)
    for ours, theirs in zip(torch.autograd.grad(output.loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # the loss itself is fp32
    assert torch.equal(model(**batch).logits, output.logits)


@torch.no_grad()
def test_documents_begin_in_padded_rows_too() -> None:
    model, rows = make().double(), prompts()
    ids, mask = padded([torch.cat([rows[2], rows[1]], 1), rows[0]], "left")
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    positions[0, -1] = 0  # the second row's one token
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(logits[0, -1:], model(rows[1]).logits[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(logits[0, -13:-1], model(rows[2]).logits[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(logits[1], model(rows[0]).logits[0], rtol=0, atol=1e-9)


def test_what_cannot_be_meant_is_refused_in_a_sentence() -> None:
    model, ids = make(), torch.arange(3, 9)[None]
    plain = torch.arange(6)[None]
    assert torch.equal(model(ids, position_ids=plain + 40).logits, model(ids).logits)
    for given, sentence in (
        ({"position_ids": plain * 2}, "position_ids leave numbers out"),
        ({"position_ids": plain[:, 1:]}, r"position_ids is \(1, 5\); it must be \(B, T\), \(1, 6\)"),
        ({"position_ids": plain % 3, "seq_idx": plain // 2}, "seq_idx and position_ids let documents begin at differ"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 7])}, "cu_seq_lens_q must run from 0 to the 6 tokens"),
        ({"token_type_ids": plain}, "token_type_ids is no argument of Titans models"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(ids, **given)


@pytest.mark.parametrize("side", ["left", None])
@pytest.mark.parametrize("variant", ["mac", pytest.param("lmm", marks=pytest.mark.slow), "transformer"])
@torch.no_grad()
def test_torch_compile_breaks_only_around_mixers_and_gives_the_same(
    variant: str, side: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row's number of tokens decides shapes inside a mixer; of what is traced, no value decides."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # tests/conftest.py sets it
    model, rows = make(variant), prompts()
    ids, mask = padded(rows, side) if side else (rows[0], None)
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(ids, attention_mask=mask, use_cache=False)
    assert all("torch.compiler.disable" in one.reason for one in found.break_reasons)
    in_one_graph = variant == "transformer" and side is None
    assert found.graph_count <= (1 if in_one_graph else 2 * len(model.model.layers) + 3)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(ids, attention_mask=mask, use_cache=False).logits, expected)
    torch._dynamo.reset()

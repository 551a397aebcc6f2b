"""Muon is torch's, matrix by matrix, beside AdamW; a run with it goes on as one that never stopped."""

import pytest
import torch
from torch import nn

from pretrain.muon import Muon, matrices_in, orthogonal
from pretrain.report.records import read_records

LR, DECAY = 0.02, 0.1


def make(groups: list[tuple[list[nn.Parameter], bool]]) -> Muon:
    more = {"weight_decay": DECAY, "momentum": 0.95}
    return Muon([{"params": params, "matrices": matrices, **more} for params, matrices in groups], lr=LR, fused=True)


def torchs(parameters: list[nn.Parameter]) -> torch.optim.Muon:
    return torch.optim.Muon(parameters, lr=LR, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 8, 8)])
def test_orthogonal_keeps_singular_vectors_and_brings_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ orthogonal(x) @ vh.mT
    values = core.diagonal(dim1=-2, dim2=-1)
    assert (core - torch.diag_embed(values)).abs().max() < 1e-10
    assert 0.3 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_a_whole_matrix_is_stepped_as_by_torch(shape):
    torch.manual_seed(0)
    ours = parameter(*shape)
    theirs = nn.Parameter(ours.detach().clone())
    muon, expected = make([([ours], True)]), torchs([theirs])
    for _ in range(4):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        expected.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_every_heads_matrices_and_both_halves_of_a_gated_layer_are_stepped_for_themselves():
    torch.manual_seed(0)
    heads, widths, columns = 3, (4, 6, 1), 10
    projection, gated = parameter(heads * sum(widths), columns), parameter(12, columns)
    projection.rows_per_head, gated.partition_stride = widths, 2
    rows = torch.arange(len(projection)).view(heads, -1)
    places = [rows[head, :4] for head in range(heads)] + [rows[head, 4:10] for head in range(heads)] + [rows[:, 10]]
    assert sum(part.numel() for part in matrices_in(projection, projection.detach())) == projection.numel()
    alone = [nn.Parameter(projection.detach()[place].clone()) for place in places]
    halves = [nn.Parameter(half.clone()) for half in gated.detach().chunk(2)]
    muon, expected = make([([projection, gated], True)]), torchs([*alone, *halves])
    for _ in range(3):
        projection.grad, gated.grad = torch.randn_like(projection), torch.randn_like(gated)
        for one, place in zip(alone, places, strict=True):
            one.grad = projection.grad[place].clone()
        for one, half in zip(halves, gated.grad.chunk(2), strict=True):
            one.grad = half.clone()
        muon.step()
        expected.step()
    for one, place in zip(alone, places, strict=True):
        torch.testing.assert_close(projection[place], one, rtol=0, atol=1e-6)
    torch.testing.assert_close(gated, torch.cat(halves), rtol=0, atol=1e-6)


def test_the_rest_is_stepped_by_adamw_bit_for_bit():
    torch.manual_seed(0)
    matrix, vector = parameter(8, 8), parameter(8)
    other = nn.Parameter(vector.detach().clone())
    muon = make([([matrix], True), ([vector], False)])
    adamw = torch.optim.AdamW([other], lr=LR, weight_decay=DECAY, fused=True)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn(8, 8), torch.randn(8)
        other.grad = vector.grad.clone()
        muon.step()
        adamw.step()
        assert torch.equal(vector, other)


def test_an_update_that_is_left_out_changes_no_bit():
    torch.manual_seed(0)
    matrix, vector = parameter(8, 8), parameter(8)
    muon = make([([matrix], True), ([vector], False)])
    for bad in (0.0, 1.0):
        muon.found_inf = torch.tensor(bad)
        matrix.grad, vector.grad = (torch.full_like(x, torch.nan if bad else 1.0) for x in (matrix, vector))
        before = [x.detach().clone() for x in (matrix, vector, *muon.state[matrix].values())]
        muon.step()
        after = [matrix, vector, *muon.state[matrix].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False)) == bool(bad)


@pytest.mark.slow
def test_a_run_with_muon_goes_on_as_one_that_never_stopped(train, tmp_path):
    muon = ["--optimizer.name", "muon", "--parallel.zero-stage", "0", "--evaluate.heldout-sequences", "0"]
    muon += ["--train.steps", "4", "--schedule.shape", "wsd"]
    losses = []
    for name, stops in (("whole", []), ("stopped", ["--train.steps", "2"])):
        for more in (stops, []) if stops else ([],):
            status, _, err = train(tmp_path / name, *muon, *more).wait()
            assert status == 0, err
        records = read_records(tmp_path / name)
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    status, _, err = train(tmp_path / "whole", *muon[4:], "--parallel.zero-stage", "0", "--train.steps", "5").wait()
    assert status == 2
    assert "muon was True and is False" in err

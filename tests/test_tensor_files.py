"""Numbers of a tensor found again in files that were written at another layout."""

import math
from itertools import pairwise

import pytest
import torch

from titans_mcore.tensor_files import (
    Division,
    Fragment,
    SavedPart,
    SavedTensors,
    TPSplit,
    Wanted,
    read_tensors,
    spans_in,
    write_tensors,
)

RULES = [None, TPSplit(0), TPSplit(1), TPSplit(2), TPSplit(0, 2), TPSplit(1, 3)]
SHAPE = (24, 24, 8)


def part(whole, rule, rank, ranks):
    return rule.take(whole, rank, ranks) if rule else whole


def save(folder, whole, rule, ranks, cuts):
    """A tensor under its name, divided over tensor-parallel ranks, each part cut into files at fractions of it."""
    parts = []
    for rank in range(ranks):
        held = part(whole, rule, rank, ranks)
        bounds = [0, *(int(cut * held.numel()) for cut in cuts), held.numel()]
        fragments = []
        for start, stop in pairwise(bounds):
            fragments.append(Fragment(start, stop, f"{rank}-{start}"))
            values = held.reshape(-1)[start:stop]
            write_tensors(folder / fragments[-1].file, {"exp_avg.name": [stop - start]}, [("exp_avg.name", values)], {})
        parts.append({"name": SavedPart(tuple(held.shape), rule, tuple(fragments))})
    return SavedTensors(folder, parts, "optimizer state")


@pytest.mark.parametrize("saved_rule", RULES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("saved_ranks", "ranks"), [(1, 4), (4, 1), (2, 4), (4, 2), (2, 2)])
def test_every_fragment_is_found_whatever_the_rules_and_ranks_were(tmp_path, saved_rule, rule, saved_ranks, ranks):
    whole = torch.randn(SHAPE)
    saved = save(tmp_path, whole, saved_rule, saved_ranks, [0.3, 0.71])
    for rank in range(ranks):
        held = part(whole, rule, rank, ranks)
        division = Division.of(rule, held.shape, ranks)
        for start, stop in [(0, held.numel()), (1, held.numel() - 5), (37, 38)]:
            found = saved.read("name", Wanted(division, rank, start, stop), kind="exp_avg.")
            assert torch.equal(found, held.reshape(-1)[start:stop])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_unchanged_division_is_one_span(rule):
    shape = part(torch.empty(SHAPE), rule, 0, 2).shape
    division = Division.of(rule, shape, 2)
    (span,) = spans_in(division, Wanted(division, 1, 5, math.prod(shape)))
    assert (span.start, span.length) == (5, math.prod(shape) - 5)


def test_what_every_rank_held_is_read_from_the_ranks_in_turn(tmp_path):
    whole = torch.randn(SHAPE)
    saved = save(tmp_path, whole, None, 2, [])
    for rank in range(2):
        saved.opened.clear()
        wanted = Wanted(Division.of(None, SHAPE, 2), rank, 0, whole.numel())
        assert torch.equal(saved.read("name", wanted, kind="exp_avg.").view(SHAPE), whole)
        assert list(saved.opened) == [f"{rank}-0"]


@pytest.mark.parametrize(("kept", "missing"), [([(4, 10)], 0), ([(0, 4)], 4), ([(0, 4), (5, 10)], 4)])
def test_a_gap_between_files_is_named(tmp_path, kept, missing):
    fragments = tuple(Fragment(start, stop, "file") for start, stop in kept)
    with pytest.raises(ValueError, match=f"exp of w at tensor-parallel rank 0 is incomplete: .* from {missing} on"):
        SavedTensors(tmp_path, [{"w": SavedPart((10,), None, fragments)}], "exp")


def test_another_models_shapes_are_refused(tmp_path):
    saved = save(tmp_path, torch.randn(SHAPE), TPSplit(1), 2, [])
    saved.check_same({"name": list(SHAPE)})
    with pytest.raises(ValueError, match=r"name is \[24, 24, 8\] in .* and \[24, 24\] here"):
        saved.check_same({"name": [24, 24]})
    with pytest.raises(ValueError, match="1 tensors of this model are missing there, other first"):
        saved.check_same({"name": list(SHAPE), "other": [3]})


def test_tensors_written_one_by_one_are_read_back(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).T,
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0),
        "b": torch.ones(2).half(),
    }
    write_tensors(tmp_path / "folder" / "file", {n: t.shape for n, t in tensors.items()}, tensors.items(), {"x": "y"})
    found, metadata = read_tensors(tmp_path / "folder" / "file", "things")
    assert metadata == {"x": "y"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=r"cannot read the things in .*nowhere"):
        read_tensors(tmp_path / "nowhere", "things")

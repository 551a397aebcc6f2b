"""The learning rate, and what a step learns from."""

from itertools import pairwise

import pytest

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import ScheduleConfig, TrainConfig
from pretrain.schedule import Portion, learning_rate, portion_of, tokens_after


def rate(step, warmup_steps=10, total_steps=110, **schedule):
    schedule = ScheduleConfig(warmup_steps=warmup_steps, min_lr_fraction=0.1, **schedule)
    return learning_rate(step, schedule, peak=2.0, total_steps=total_steps)


def test_it_rises_in_a_line_to_the_peak():
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])


def test_it_falls_as_half_a_cosine_to_the_minimum_and_stays_there():
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(110) == pytest.approx(0.2)
    assert rate(500) == pytest.approx(0.2)
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_a_line_falls_by_the_same_at_every_step():
    rates = [rate(step, shape="linear") for step in range(10, 111)]
    assert [a - b for a, b in pairwise(rates)] == pytest.approx([1.8 / 100] * 100)
    assert rate(500, shape="linear") == pytest.approx(0.2)


def test_warm_up_stable_decay_stays_at_the_peak_and_falls_in_its_last_steps():
    rates = [rate(step, shape="wsd", decay_steps=20) for step in range(1, 111)]
    assert rates[9:90] == pytest.approx([2.0] * 81)
    assert [a - b for a, b in pairwise(rates[89:])] == pytest.approx([1.8 / 20] * 20)
    assert [rate(step, shape="wsd") for step in (10, 60, 110)] == pytest.approx([2.0] * 3)


def test_how_far_a_stable_run_is_meant_to_go_changes_none_of_its_rates():
    short, long = ([rate(step, shape="wsd", total_steps=total) for step in range(1, 80)] for total in (80, 8_000))
    assert short == long


def test_without_a_warm_up_the_first_step_is_near_the_peak():
    assert rate(1, warmup_steps=0) == pytest.approx(2.0, rel=1e-3)


def test_a_run_as_short_as_its_warm_up_never_divides_by_zero():
    assert rate(10, warmup_steps=10, total_steps=10) == pytest.approx(2.0)


def warm(**changes):
    batch = {"global_batch": 24, "micro_batch": 2, "batch_warmup_from": 4, "batch_warmup_tokens": 10_000}
    sequence = {"sequence_length": 64, "sequence_warmup_from": 8, "sequence_warmup_tokens": 30_000}
    return TrainConfig(**{**batch, **sequence, **changes})


def walk(train, steps):
    """Portions by going through the steps, which is what portion_of must not have to do."""
    found, first = [], 0
    for _ in range(steps):
        tokens, samples, row = first * train.sequence_length, train.global_batch, train.sequence_length
        if train.batch_warmup_from:
            stairs = train.global_batch // train.batch_warmup_from - 1
            samples = train.batch_warmup_from * min(stairs + 1, 1 + tokens * stairs // train.batch_warmup_tokens)
        if train.sequence_warmup_from:
            doublings = (train.sequence_length // train.sequence_warmup_from).bit_length() - 1
            row = train.sequence_warmup_from * 2 ** min(doublings, tokens * doublings // train.sequence_warmup_tokens)
        found.append(Portion(first, samples, row))
        first += samples
    return found


@pytest.mark.parametrize("tokens", [1, 63, 64, 999, 10_000, 10_001, 123_456])
@pytest.mark.parametrize("start", [2, 4, 12])
def test_a_portion_is_a_function_of_the_step_that_agrees_with_walking_there(tokens, start):
    train = warm(batch_warmup_from=start, batch_warmup_tokens=tokens)
    assert [portion_of(step, train) for step in range(1, 201)] == walk(train, 200)


def test_both_warm_ups_rise_and_end_with_their_tokens():
    train = warm()
    portions = [portion_of(step, train) for step in range(1, 60)]
    assert portions[0] == Portion(0, 4, 8)
    assert sorted({portion.samples for portion in portions}) == [4, 8, 12, 16, 20, 24]
    assert sorted({portion.row_length for portion in portions}) == [8, 16, 32, 64]
    for portion in portions:
        assert (portion.samples == 24) == (portion.first * 64 >= 10_000)
        assert (portion.row_length == 64) == (portion.first * 64 >= 30_000)


def test_without_warm_ups_every_step_is_alike():
    train = TrainConfig(global_batch=6, micro_batch=2, sequence_length=10)
    assert [portion_of(step, train) for step in (1, 2, 1_000_001)] == [(0, 6, 10), (6, 6, 10), (6_000_000, 6, 10)]
    assert tokens_after(7, train) == 7 * train.tokens_per_step


def test_tokens_are_those_of_the_samples_whatever_the_rows():
    train = warm()
    for step in range(60):
        assert tokens_after(step, train) == 64 * sum(portion_of(s, train).samples for s in range(1, step + 1))


def test_every_batch_can_be_shared_out_when_the_first_can():
    assert RunConfig(train=warm()).accumulation(2) == 6
    message = r"batch_warmup_from 4 cannot be shared out over 3 data ranks .*; make it a multiple of 6"
    with pytest.raises(ValueError, match=message):
        RunConfig(train=warm()).accumulation(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_warmup_tokens": 0}, "batch_warmup_from is 4 and train.batch_warmup_tokens 0; a warm-up needs both"),
        ({"sequence_warmup_from": 0}, "sequence_warmup_from is 0 and train.sequence_warmup_tokens 30000; a warm-up"),
        ({"batch_warmup_from": -4}, "train.batch_warmup_from is -4; it must be at least 0"),
        ({"batch_warmup_from": 24}, "train.batch_warmup_from 24 is no less than train.global_batch 24; lower it"),
        ({"sequence_warmup_from": 64}, "sequence_warmup_from 64 is no less than train.sequence_length 64; lower it"),
        ({"batch_warmup_from": 3}, "batch_warmup_from 3 must be a multiple of train.micro_batch 2"),
        ({"batch_warmup_from": 10}, "batch_warmup_from 10 must .* go into train.global_batch 24 without rest"),
        ({"sequence_warmup_from": 10}, "sequence_warmup_from 10 does not become train.sequence_length 64 by doubling"),
        ({"sequence_length": 24}, "sequence_warmup_from 8 does not become train.sequence_length 24 by doubling"),
    ],
    ids=str,
)
def test_a_warm_up_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        warm(**changes)

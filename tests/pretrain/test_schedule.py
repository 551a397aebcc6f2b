"""The learning rate."""

import pytest

from pretrain.schedule import learning_rate


def rate(step, warmup_steps=10, total_steps=110):
    return learning_rate(step, peak=2.0, warmup_steps=warmup_steps, total_steps=total_steps, min_fraction=0.1)


def test_it_rises_in_a_line_to_the_peak():
    assert [rate(step) for step in (1, 5, 10)] == pytest.approx([0.2, 1.0, 2.0])


def test_it_falls_as_half_a_cosine_to_the_minimum_and_stays_there():
    assert rate(60) == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rate(110) == pytest.approx(0.2)
    assert rate(500) == pytest.approx(0.2)
    rates = [rate(step) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_without_a_warm_up_the_first_step_is_near_the_peak():
    assert rate(1, warmup_steps=0) == pytest.approx(2.0, rel=1e-3)


def test_a_run_as_short_as_its_warm_up_never_divides_by_zero():
    assert rate(10, warmup_steps=10, total_steps=10) == pytest.approx(2.0)

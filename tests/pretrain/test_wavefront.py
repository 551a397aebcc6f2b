"""The wavefront's arithmetic: closed forms, bounds, and what must not get better when something gets worse."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config.command_line import parse
from pretrain.plan.layout import for_gpus, layout_of, workload_of
from pretrain.plan.parameters import parameters_of
from pretrain.plan.step_time import GPUS, head_flops, recomputed_flops, step_flops, step_time

from .wavefront import BACKWARD, FORWARD, Link, Work, equal_efficiency, simulate

SECONDS = st.integers(10, 10_000).map(lambda milliseconds: milliseconds / 1000)


def equal(layers: int, ranks: int, forward: float = 1.0, backward: float = 2.0, micro_batches: int = 1, **more: float):
    return [[Work([forward] * layers, [backward] * layers, **more)] * ranks] * micro_batches


@st.composite
def any_work(draw: st.DrawFn, micro_batches: int = 2) -> list[list[Work]]:
    """Every rank and layer takes a time of its own."""
    layers, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    each = st.lists(SECONDS, min_size=layers, max_size=layers)
    rank = st.builds(Work, each, each, SECONDS, SECONDS, SECONDS)
    return [draw(st.lists(rank, min_size=ranks, max_size=ranks)) for _ in range(micro_batches)]


def any_link(bytes_per_second: float = 1e9) -> st.SearchStrategy[Link]:
    sizes, at_once = st.integers(0, 10**9), st.frozensets(st.integers(0, 3))
    return st.builds(Link, sizes, sizes, st.just(bytes_per_second), SECONDS, at_once)


@pytest.mark.parametrize(("layers", "ranks", "n"), list(product((1, 3, 24), (1, 2, 8, 512), (1, 3))))
def test_equal_times_reproduce_the_closed_form(layers, ranks, n):
    found = simulate(equal(layers, ranks, 1.0, 2.5, n))
    assert found.efficiency == pytest.approx(equal_efficiency(layers, ranks))
    assert found.seconds == pytest.approx(n * (layers + ranks - 1) * 3.5)


@pytest.mark.parametrize(
    ("layers", "ranks", "n", "in_flight"), [(3, 8, 4, 4), (24, 8, 8, 8), (24, 8, 8, 4), (5, 3, 7, 2)]
)
def test_passes_in_flight_fill_the_gaps(layers, ranks, n, in_flight):
    """Of each group of forward passes, and of backward ones, only the first waits for the ranks in front."""
    found = simulate(equal(layers, ranks, 1.0, 2.0, n), in_flight=in_flight)
    groups = -(-n // in_flight)
    assert found.seconds == pytest.approx(3 * (n * layers + groups * (ranks - 1)))
    if groups == 1:
        assert found.efficiency == pytest.approx(n * layers / (n * layers + ranks - 1))


def test_the_head_of_all_ranks_but_the_last_hides_in_their_waiting():
    assert simulate(equal(4, 3, head=5.0)).seconds == pytest.approx((4 + 3 - 1) * 3 + 5)


def test_a_message_delays_every_rank_behind_it():
    link = Link(forward_bytes=10, backward_bytes=20, bytes_per_second=100, latency_seconds=0.05)
    assert simulate(equal(4, 3), link).seconds == pytest.approx((4 + 3 - 1) * 3 + 2 * (0.15 + 0.25))


@pytest.mark.parametrize(("layers", "ranks"), list(product((1, 3, 24), (1, 2, 8, 512))))
def test_layers_whose_states_compose_wait_for_messages_alone_and_once_each_way(layers, ranks):
    link = Link(10, 20, bytes_per_second=100, latency_seconds=0.05, at_once=range(layers))
    assert simulate(equal(layers, ranks)).seconds == pytest.approx((layers + ranks - 1) * 3)
    assert simulate(equal(layers, ranks), link).seconds == pytest.approx(layers * 3 + (ranks - 1) * (0.15 + 0.25))


def test_one_layer_whose_state_does_not_compose_makes_a_wavefront_of_equal_layers():
    mixed = simulate(equal(24, 8), Link(at_once=range(23)))
    assert mixed.seconds == pytest.approx((24 + 8 - 1) * 3)
    # A short one makes a short one.
    work = Work([1.0] * 23 + [0.1], [2.0] * 23 + [0.2])
    assert simulate([[work] * 8], Link(at_once=range(23))).seconds == pytest.approx(23 * 3 + 8 * 0.3)


def test_a_link_that_is_slower_than_the_layers_sets_the_pace():
    # The last of 4 states leaves after the first layer and four messages of 2 seconds; its layer follows.
    link = Link(forward_bytes=2, backward_bytes=0, bytes_per_second=1)
    found = simulate(equal(4, 2), link)
    assert max(task.end for task in found.computations if task.direction == FORWARD) == pytest.approx(1 + 4 * 2 + 1)


@given(any_work(), any_link())
def test_efficiency_is_a_share_and_idle_time_is_the_rest_of_it(work, link):
    found = simulate(work, link)
    assert 0 < found.efficiency <= 1 + 1e-12
    assert sum(found.idle_shares) / len(found.idle_shares) == pytest.approx(1 - found.efficiency, abs=1e-9)
    if len(work[0]) == 1:
        assert found.efficiency == pytest.approx(1)


@given(any_work(), any_link())
def test_no_task_begins_before_what_it_needs(work, link):
    ends = {(t.micro_batch, t.rank, t.direction, t.layer): t.end for t in simulate(work, link).computations}
    seconds = link.latency_seconds
    for task in simulate(work, link).computations:
        step = 1 if task.direction == FORWARD else -1
        at = (task.micro_batch, task.direction, task.layer)
        own = (task.micro_batch, task.rank, task.direction, task.layer - step)
        neighbour = (at[0], task.rank - step, at[1], at[2])
        turned = (task.micro_batch, task.rank, FORWARD, task.layer) if task.direction == BACKWARD else None
        for needed in (own, neighbour, turned):
            if needed in ends:
                # Where states compose the neighbour's is needed at the end.
                late = needed == neighbour and task.layer in link.at_once
                assert (task.end - seconds if late else task.start) >= ends[needed] - 1e-9


@given(any_work(1), any_link(), st.data())
def test_a_slower_layer_or_link_never_shortens_the_step(work, link, data):
    rank, layer = data.draw(st.integers(0, len(work[0]) - 1)), data.draw(st.integers(0, len(work[0][0].forward) - 1))
    times = list(work[0][rank].backward)
    times[layer] += 1
    slower = [[own._replace(backward=times) if r == rank else own for r, own in enumerate(work[0])]]
    before = simulate(work, link).seconds
    assert simulate(slower, link).seconds >= before - 1e-9
    assert simulate(work, link._replace(latency_seconds=link.latency_seconds + 1)).seconds >= before - 1e-9
    assert simulate(work, link._replace(bytes_per_second=1e8)).seconds >= before - 1e-9


@given(st.integers(1, 30), st.integers(1, 40), SECONDS, SECONDS, SECONDS)
def test_more_ranks_are_faster_in_all_and_worse_each(layers, ranks, forward, backward, head):
    """The same row over one rank more."""

    def divided(ranks: int):
        return simulate(equal(layers, ranks, forward / ranks, backward / ranks, head=head / ranks))

    few, more = divided(ranks), divided(ranks + 1)
    assert more.efficiency <= few.efficiency + 1e-12
    assert more.seconds <= few.seconds + 1e-12
    assert more.seconds >= divided(1).seconds / (ranks + 1) - 1e-12


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("preset", ["mag_760m", "gated_deltanet_340m", "samba_340m"])
def test_the_plans_formula_is_what_the_tasks_come_to(preset, recompute):
    words = ["--config", preset, "--run-dir", "unused", "--train.recompute", recompute, "--parallel.context", "8"]
    words += ["--model.vocab-size", "32000", "--train.sequence-length", "131072", "--train.global-batch", "4"]
    config = for_gpus(parse([*words, "--train.micro-batch", "1", "--parallel.in-flight", "2"]).config)
    layout, blocks, tokens = layout_of(config, 8), config.model.blocks, config.train.tokens_per_step
    parameters = parameters_of(config.model)
    found, layers = step_time(config, layout, parameters, GPUS["h100"], 0.4), config.model.num_layers
    rate = GPUS["h100"].flops * 0.4 * 8 * layout.micro_batches
    head = 3 * head_flops(config.model, tokens)
    forward = (step_flops(config, parameters)["total"] - head) / 3 / layers / rate
    backward = 2 * forward + recomputed_flops(config, parameters) / layers / rate
    alone = layers * (forward + backward) + head / rate
    more = sum(mixer.composing_flops(config.model, tokens) for mixer in blocks) / layers / rate
    again = 1 if recompute == "none" else 2
    work = Work([forward + more] * layers, [backward + (1 + again) * more] * layers, head=head / rate)
    size = sum(mixer.message(workload_of(config, layout)) for mixer in blocks) // layers
    at_once = [block for block, mixer in enumerate(blocks) if mixer.composes]
    link = Link(size, size, GPUS["h100"].network_bytes, 1e-5, at_once)
    assert found.wavefront_efficiency == pytest.approx(2 * alone / simulate([[work] * 8] * 2, link, 2).seconds)

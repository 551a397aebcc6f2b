"""Megatron's random streams on a machine without CUDA."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("this is about machines without CUDA", allow_module_level=True)

from megatron.core.tensor_parallel import random as megatron_random

from titans_mcore.parallel.cpu import CpuRngTracker, enable_cpu


@pytest.fixture
def tracker():
    torch.manual_seed(5)
    tracker = CpuRngTracker()
    tracker.add("left", 100)
    tracker.add("right", 200)
    return tracker


def draws(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(3, generator=generator) for _ in range(count)]


def test_fork_draws_from_the_named_stream(tracker):
    with tracker.fork("left"):
        assert torch.equal(torch.rand(3), draws(100, 1)[0])


def test_a_stream_goes_on_where_its_last_fork_stopped(tracker):
    for expected in draws(100, 3):
        with tracker.fork("left"):
            assert torch.equal(torch.rand(3), expected)


def test_the_default_stream_does_not_see_a_fork(tracker):
    outside = draws(5, 2)
    assert torch.equal(torch.rand(3), outside[0])
    with tracker.fork("right"):
        torch.rand(1000)
    assert torch.equal(torch.rand(3), outside[1])


def test_a_fork_inside_a_fork_leaves_the_outer_stream_where_it_was(tracker):
    left, right = draws(100, 2), draws(200, 1)
    with tracker.fork("left"):
        assert torch.equal(torch.rand(3), left[0])
        with tracker.fork("right"):
            assert torch.equal(torch.rand(3), right[0])
        assert torch.equal(torch.rand(3), left[1])


def test_a_fork_of_the_same_stream_inside_itself_continues_it(tracker):
    left = draws(100, 3)
    with tracker.fork("left"):
        assert torch.equal(torch.rand(3), left[0])
        with tracker.fork("left"):
            assert torch.equal(torch.rand(3), left[1])
        assert torch.equal(torch.rand(3), left[2])


def test_an_error_inside_a_fork_gives_the_default_stream_back(tracker):
    with pytest.raises(RuntimeError), tracker.fork("left"):
        torch.rand(3).view(7)
    assert torch.equal(torch.rand(3), draws(5, 1)[0])
    with tracker.fork("left"):
        assert torch.equal(torch.rand(3), draws(100, 2)[1])


def test_saved_states_replay_a_stream(tracker):
    states = tracker.get_states()
    with tracker.fork("left"):
        first = torch.rand(3)
    tracker.set_states(states)
    with tracker.fork("left"):
        assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("name", "seed"), [("left", 300), ("middle", 100)], ids=["name-taken", "seed-taken"])
def test_a_name_or_seed_that_is_taken_is_refused(tracker, name, seed):
    with pytest.raises(ValueError, match=r"is taken|exists already"):
        tracker.add(name, seed)


def test_an_unknown_stream_is_refused(tracker):
    with pytest.raises(ValueError, match="middle was not added"), tracker.fork("middle"):
        pass


def test_enabling_again_keeps_the_streams():
    assert enable_cpu()
    first = megatron_random.get_cuda_rng_tracker()
    assert isinstance(first, CpuRngTracker)
    assert enable_cpu()
    assert megatron_random.get_cuda_rng_tracker() is first


def test_megatrons_device_calls_have_a_cpu_meaning():
    enable_cpu()
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    torch.cuda.synchronize()

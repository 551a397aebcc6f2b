"""What the memories are seen to do, and that to look changes nothing."""

import json
import sys

import pytest
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.telemetry import QUANTITIES, MemoryTelemetry

from .matrices import ONE_OF_A_KIND
from .pretrain.jobs import ROOT, Job

LENGTH = 48
SETTINGS = {
    "vocab_size": 100,
    "num_layers": 2,
    "dim": 32,
    "num_heads": 2,
    "memory_heads": 2,
    "linear_heads": 2,
    "ffn_dim": 64,
    "memory_expansion": 2,
}
SETTINGS |= {"chunk_size": 4, "persistent_tokens": 3, "segment_length": 16, "window": 16, "theta_max": 0.5}


@pytest.fixture(scope="module")
def groups():
    yield start(1, seed=0)
    stop()


def model_of(groups, dtype=torch.float32, recompute="none", **settings) -> TitansModel:
    torch.manual_seed(0)
    config = TitansConfig(**SETTINGS | settings)
    return TitansModel(config, transformer_config(config, dtype=dtype), groups, recompute=recompute)


def batch(documents: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens = torch.randint(0, 100, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, 20] = starts[1, 7] = True
    return tokens, starts if documents else None


def seen_of(model: TitansModel, documents: bool = True, every_tokens: int = 1) -> dict[str, list[float]]:
    tokens, starts = batch(documents)
    telemetry = MemoryTelemetry(model, every_tokens)
    with telemetry.watching():
        model(tokens, tokens, starts)
    return telemetry.collect()


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
@pytest.mark.parametrize("recompute", ["none", "block", "except_memory"])
def test_losses_gradients_and_random_numbers_are_bitwise_the_same_with_it_and_without(groups, variant, recompute):
    tokens, starts = batch()

    def run(watched: bool) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        model = model_of(groups, variant=variant, recompute=recompute)
        telemetry = MemoryTelemetry(model)
        if watched:
            with telemetry.watching():
                losses = model(tokens, tokens, starts)
        else:
            losses = model(tokens, tokens, starts)
        seen = telemetry._totals
        losses.mean().backward()
        # Recomputing goes through the same modules again, and must not be seen.
        assert telemetry._totals is seen
        assert bool(telemetry.collect()) == (watched and MIXERS[variant].memory)
        assert not any(module._forward_pre_hooks for module in model.modules())
        return losses, [p.grad for p in model.parameters()], torch.get_rng_state()

    (losses, gradients, random), (plain, of_plain, random_plain) = run(True), run(False)
    assert torch.equal(losses, plain)
    assert torch.equal(random, random_plain)
    assert all(torch.equal(a, b) for a, b in zip(gradients, of_plain, strict=True))


@pytest.mark.parametrize("variant", [name for name, mixer in MIXERS.items() if mixer.memory])
def test_every_token_of_the_first_row_counts_once_and_persistent_ones_do_not(groups, variant):
    model = model_of(groups, variant=variant)
    tokens, starts = batch()
    telemetry = MemoryTelemetry(model, every_tokens=1)
    with telemetry.watching():
        model(tokens, tokens, starts)
    counts = dict(zip(QUANTITIES, telemetry._totals[0, :, 1].tolist(), strict=True))
    assert {name: counts[name] for name in ("theta", "eta", "alpha")} == dict.fromkeys(
        ("theta", "eta", "alpha"), LENGTH
    )
    assert counts["surprise"] == counts["held"] == LENGTH * 2  # heads


@pytest.mark.parametrize("variant", ["lmm", "mac"])
@pytest.mark.parametrize("gates", ["matrix", "shared"])
def test_gates_are_what_the_biases_make_them(groups, variant, gates):
    model = model_of(groups, variant=variant, memory_gates=gates)
    theta, eta, alpha = 0.3, 0.8, [0.01, 0.2]
    for name, parameter in model.named_parameters():
        sets = 2 if gates == "matrix" else 1
        if name.endswith("gate_bias"):
            biases = [[theta] * sets + [eta] * sets + [rate] * sets for rate in alpha]
            parameter.data = torch.logit(torch.tensor(biases))
        if name.endswith("memory.kv_gates_proj.weight"):  # a head: key, value, gates
            parameter.data.unflatten(0, (2, -1))[:, 2 * 16 :] = 0.0
    seen = seen_of(model, documents=False)
    for block in range(2):
        assert seen["theta"][block] == pytest.approx(0.5 * theta)
        assert seen["eta"][block] == pytest.approx(eta)
        assert seen["alpha"][block] == pytest.approx(sum(alpha) / 2)


def test_what_is_switched_off_is_0_and_nothing_is_forgotten(groups):
    seen = seen_of(model_of(groups, variant="lmm", memory_momentum=False, memory_forgetting=False))
    assert seen["eta"] == seen["alpha"] == [0.0, 0.0]


@pytest.mark.parametrize("variant", [name for name, mixer in MIXERS.items() if mixer.memory])
@pytest.mark.parametrize("alpha", ["head", "channel"])
def test_the_memories_of_a_model_are_seen_as_the_oracle_runs_them(groups, variant, alpha):
    found = seen_of(model_of(groups, torch.float64, variant=variant, memory_alpha=alpha, memory_backend="chunked"))
    literal = seen_of(model_of(groups, torch.float64, variant=variant, memory_alpha=alpha, memory_backend="oracle"))
    assert set(found) == set(QUANTITIES)
    for name, values in literal.items():
        assert found[name] == pytest.approx(values, rel=1e-8), name


def test_a_first_row_of_one_document_among_packed_rows_is_seen_as_it_is_alone(groups):
    tokens, starts = batch()
    starts[0] = False
    seen = []
    for rows in (starts, None):
        telemetry = MemoryTelemetry(model := model_of(groups, variant="mag"), 1)
        with telemetry.watching():
            model(tokens, tokens, rows)
        seen.append(telemetry.collect())
    assert seen[0] == {name: pytest.approx(values, nan_ok=True) for name, values in seen[1].items()}


def test_collecting_begins_anew(groups):
    model = model_of(groups, variant="lmm")
    tokens, starts = batch()
    telemetry = MemoryTelemetry(model)
    with telemetry.watching():
        model(tokens, tokens, starts)
    model(tokens, tokens, starts)
    assert telemetry.collect()["theta"]
    assert telemetry.collect() == {}


def test_a_model_without_memories_has_nothing_to_tell(groups):
    assert seen_of(model_of(groups, variant="transformer")) == {}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_divided_model_is_seen_as_a_whole_one_and_trains_bitwise_as_unwatched(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.telemetry_worker", str(tmp_path / "found.json")]
    status, out, err = Job([sys.executable, *torchrun, *worker], ROOT).wait(timeout_seconds=1000)
    assert status == 0, out + err
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["errors"]) == 7
    assert max(found["errors"].values()) < 1e-9, found["errors"]
    assert found["watched"] == found["unwatched"]
    assert all(found["seen"].values())

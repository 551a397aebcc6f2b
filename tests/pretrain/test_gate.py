"""An update is left out by selection: weights, moments and counts stay bit for bit what they were."""

import math

import pytest
import torch

from pretrain.checkpoint.carried import CarriedState
from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.engine import build_engine, build_model, train_step


@pytest.fixture
def engine(tiny_toml, one_process):
    """An engine after two good updates."""

    def build(*settings):
        config = parse(["--config", str(tiny_toml), "--run-dir", "unused", *settings]).config
        torch.manual_seed(0)
        engine = build_engine(build_model(config, one_process), config, 1)
        for _ in range(2):
            assert train_step(engine, batch(), 1e-2).updated
        return engine

    return build


def batch():
    tokens = torch.randint(3, 96, (2, 2, 32))
    return [MicroBatch(rows, rows.roll(-1, 1), None) for rows in tokens]


def state_of(engine):
    """Copies of all that an update changes."""
    optimizer = engine.basic_optimizer
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq", "step")]
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    return [torch.as_tensor(tensor).detach().clone() for tensor in (*moments, *stepped, *weights)]


def same(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


KINDS = [*[["--parallel.zero-stage", str(stage)] for stage in range(4)], ["--train.precision", "bf16"]]
KINDS += [["--optimizer.clip-norm", "0"], ["--parallel.offload-optimizer", "true"]]


@pytest.mark.parametrize("settings", KINDS, ids=" ".join)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_a_number_changes_nothing_and_the_next_step_goes_on(engine, settings, where):
    trained = engine(*settings)
    before = state_of(trained)
    target = trained.module.layers[0].mixer if where == "loss" else trained.module.final_norm
    with target.register_forward_hook(broken_output if where == "loss" else broken_gradient):
        result = train_step(trained, batch(), 1e-2)
    assert not result.updated
    assert math.isfinite(result.loss) == (where == "gradient")
    assert not math.isfinite(result.grad_norm)
    assert same(before, state_of(trained))

    result = train_step(trained, batch(), 1e-2)
    assert result.updated
    assert math.isfinite(result.loss)
    assert not same(before, state_of(trained))
    assert all(torch.isfinite(tensor).all() for tensor in state_of(trained))


def broken_output(module, inputs, output):
    return (output[0] * torch.nan, *output[1:])


def broken_gradient(module, inputs, output):
    output.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize("settings", KINDS[:5], ids=" ".join)
def test_a_loss_above_its_limit_leaves_the_update_out_and_is_told(engine, settings):
    trained = engine(*settings)
    before = state_of(trained)
    result = train_step(trained, batch(), 1e-2, loss_limit=1.0)
    assert not result.updated
    assert math.isfinite(result.grad_norm)
    assert result.loss > 1.0
    assert same(before, state_of(trained))
    assert train_step(trained, batch(), 1e-2, loss_limit=result.loss + 1).updated


def test_rows_go_on_from_the_state_before_a_step_that_was_left_out(tiny_toml, one_process):
    settings = ["--data.carry-state", "true", "--train.sequence-length", "12"]
    config = parse(["--config", str(tiny_toml), "--run-dir", "unused", *settings]).config
    trained, carried = build_engine(build_model(config, one_process), config, 1), CarriedState(config.model)
    rows = [MicroBatch(x.tokens[:, :12], x.labels[:, :12], None, begins=False) for x in batch()]
    assert not train_step(trained, rows, 1e-2, carried, loss_limit=0.0).updated
    assert carried.states == {}
    assert train_step(trained, rows, 1e-2, carried).updated
    before = dict(carried.states)
    assert not train_step(trained, rows, 1e-2, carried, loss_limit=0.0).updated
    assert carried.states == before

"""A run that begins with the weights of an exported model, at another layout than that of the run it came from."""

import json
from pathlib import Path

import pytest
import torch

from titans_mcore.hf.configuration_titans import TitansHFConfig
from titans_mcore.hf.mapping import to_exported
from titans_mcore.hf.modeling_titans import TitansForCausalLM
from titans_mcore.hf.to_native import import_run
from titans_mcore.weights import find_checkpoint, load_full

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, tensors = load_full(find_checkpoint(finished_run))
    model = TitansForCausalLM(TitansHFConfig.from_titans(config))
    model.load_state_dict(to_exported(config, tensors), strict=False)
    folder = tmp_path_factory.mktemp("exported") / "hf"
    model.save_pretrained(folder)
    return folder


def losses_of(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_training_begins_with_imported_weights(exported, finished_run, train, tmp_path, zero_stage) -> None:
    _, imported = load_full(import_run(exported, tmp_path / "run"))
    stage = ("--parallel.zero-stage", str(zero_stage))
    still = ("--train.steps", "2", "--optimizer.lr", "1e-12", "--schedule.warmup-steps", "1")
    status, out, err = train(tmp_path / "run", *still, *stage).wait()
    assert status == 0, out + err
    assert "beginning with the weights in" in out
    losses, trained = losses_of(tmp_path / "run"), losses_of(finished_run)
    assert losses[0] < trained[0] - 0.5 * (trained[0] - trained[-1])  # it has learned already
    checkpoint = find_checkpoint(tmp_path / "run")
    assert checkpoint.name == "step-00000002"
    for name, tensor in load_full(checkpoint)[1].items():
        torch.testing.assert_close(tensor, imported[name], rtol=0, atol=1e-9)


def test_imported_weights_of_another_model_are_refused(exported, train, tmp_path) -> None:
    import_run(exported, tmp_path / "run")
    status, _, err = train(tmp_path / "run", "--model.chunk-size", "4").wait()
    assert status == 2
    assert "chunk_size is 8 there and 4 here" in err

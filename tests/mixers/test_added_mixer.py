"""A mixer that is two files more in titans_mcore/mixers trains, resumes, reshapes, exports, plans and is evaluated.

The files beside this one are put into a copy of the project, and nothing else is touched.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from titans_mcore.mixers import MIXERS

from ..evals.conftest import train_tokenizer
from ..pretrain.conftest import TINY
from ..pretrain.jobs import ROOT, Job
from ..pretrain.tiny_shards import write_shards

ADDED = ("moving_average.py", "ema_mixer.py")
# Several commands one after the other in a process, which loads torch and Megatron-core once.
IN_TURN = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
"""
PACKAGES = ("titans_mcore", "pretrain", "evals", "tokenization")


class Project:
    """A copy of the project with the mixer, and a run's settings and data."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "shards"
        for package in PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "results"))
        for name in ADDED:
            source = Path(__file__).with_name(name).read_text()
            (folder / "titans_mcore" / "mixers" / name).write_text(source.replace("from titans_mcore.", "from .."))
        write_shards(self.data, vocab_size=360, documents=60, tokenizer=train_tokenizer(360))
        self.settings = folder / "run.toml"
        settings = TINY.replace("[data]", f'[data]\npath = "{self.data}"').replace("num_layers = 1", "num_layers = 2")
        self.settings.write_text(settings.replace("every_steps = 10", "every_steps = 2"))

    def run(self, module: str, *words: object, processes: int = 1) -> str:
        """Standard output of a command that ends well."""
        many = ["torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d"]
        start = [*many, "--rdzv-endpoint", "localhost:0", "-m", module] if processes > 1 else [module]
        status, out, err = Job([sys.executable, "-m", *start, *map(str, words)], self.folder, self.folder).wait()
        assert status == 0, out + err
        return out

    def run_in_turn(self, *commands: tuple[object, ...]) -> str:
        """Standard output of commands that end well, in one process."""
        words = json.dumps([list(map(str, command)) for command in commands])
        status, out, err = Job([sys.executable, "-c", IN_TURN, words], self.folder, self.folder).wait()
        assert status == 0, out + err
        return out

    def train(self, run: Path, variant: str, *words: object, processes: int = 1) -> dict[int, dict[str, Any]]:
        """What the last attempt of four steps says of each of them."""
        own = ("--config", self.settings, "--run-dir", run, "--variant", variant, "--train.steps", 4)
        self.run("pretrain.train", *own, *words, processes=processes)
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if line["kind"] == "step"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return Project(tmp_path_factory.mktemp("project"))


@pytest.mark.parametrize("variant", ["ema", pytest.param("ema+lmm+transformer", marks=pytest.mark.slow)])
def test_an_added_mixer_goes_all_the_way(project: Project, tmp_path: Path, variant: str) -> None:
    blocks = ("--model.num-layers", 1 + variant.count("+"))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    expected = project.train(whole, variant, *blocks)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000004")
    (resumed / "metrics.jsonl").unlink()
    found = project.train(resumed, variant, *blocks, "--parallel.tensor", 2, processes=2)
    assert sorted(expected) == [1, 2, 3, 4]
    assert sorted(found) == [3, 4]
    for step, line in found.items():
        assert line["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected[step]["grad_norm"], rel=1e-4)
    shards = [load_file(resumed / f"checkpoints/step-00000004/weights/tp-0{rank}-of-02.safetensors") for rank in (0, 1)]
    shapes = [tuple(shard["layers.0.mixer.rate_bias"].shape) for shard in shards]
    assert shapes == [(2, 1), (2, 1)]
    assert shards[0]["layers.0.mixer.rate.weight"].equal(shards[1]["layers.0.mixer.rate.weight"])

    exported, commands = (
        tmp_path / "hf",
        [("titans_mcore.hf.convert", "--checkpoint", resumed, "--output", tmp_path / "hf")],
    )
    for model in (resumed, exported):
        asked = ("--tokenizer", project.data / "tokenizer.model", "--tokens", 256, "--length", 64)
        where = ("--checkpoint", model, "--data", project.data, "--output", tmp_path / f"eval of {model.name}")
        commands.append(("evals.position_perplexity", *where, *asked))
    asked = ("--config", project.settings, "--variant", variant, *blocks, "--parallel.tensor", 2, "--gpus", 2, "--json")
    said = project.run_in_turn(*commands, ("pretrain.plan", *asked))
    assert "largest difference of a logit" in said
    card = (exported / "README.md").read_text()
    assert "Exponential moving average" in card
    assert "| heads of the average | 4 of 8 |" in card
    for model in (resumed, exported):
        report = json.loads((tmp_path / f"eval of {model.name}" / "position_perplexity.json").read_text())
        assert report["model"]["variant"] == variant
    plan = json.loads(said[said.index("{\n") :])
    numbers = sum(tensor.numel() for tensor in load_file(exported / "model.safetensors").values())
    assert plan["parameters"]["total"] - numbers == (384 - 360) * 32  # the vocabulary's padding
    assert (plan["step"]["flops"]["memory"] > 0) == ("lmm" in variant)


def test_a_wrong_mixer_is_refused_in_a_sentence(project: Project) -> None:
    words = ["-m", "pretrain.train", "--config", str(project.settings), "--run-dir", "unused", "--variant", "ema+mega"]
    status, _, err = Job([sys.executable, *words], project.folder, project.folder).wait()
    assert status == 2
    names = ", ".join(sorted([*MIXERS, "ema"]))
    assert f"it must be one of {names}, or several of them joined by +" in err

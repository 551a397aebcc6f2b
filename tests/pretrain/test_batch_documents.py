"""`python -m pretrain.data.batch_documents`: from a step back to the texts it learned from."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from pretrain.config.files import load_run_config, write_run_config
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import DataConfig, TrainConfig
from pretrain.data.batch_documents import main
from tests.commands import status_of
from titans_mcore.config import TitansConfig
from tokenization.encode import EncodeSettings, encode
from tokenization.manifest import Manifest
from tokenization.trace import trace
from tokenization.train import TrainSettings, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which only the settings are there, on shards of a real encoding."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"{number}.txt").write_text(f"text {number}\n{Path(__file__).read_text()}")
    texts, tokenizer = (str(folder / "text"),), folder / "tokenizer.model"
    train(TrainSettings(input=texts, output=tokenizer, vocab_size=400))
    encode(EncodeSettings(input=texts, tokenizer=tokenizer, output=folder / "shards", workers=1))
    config = RunConfig(
        model=TitansConfig(vocab_size=Manifest.load(folder / "shards").tokenizer.vocab_size),
        data=DataConfig(path=str(folder / "shards")),
        train=TrainConfig(steps=5, sequence_length=64, global_batch=4, micro_batch=2),
    )
    write_run_config(config, folder)
    return folder


def test_every_line_leads_to_the_text_the_step_learned_from(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(main, "--run", run_dir, "--step", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {int(line.split(":")[0].split()[1]) for line in lines} == {4, 5, 6, 7}
    found = re.fullmatch(r"sample 4: train document (\d+) tokens (\d+) to (\d+), (.*) row 0", lines[0])
    assert found
    traced = trace(run_dir / "shards" / "train", 0)
    assert Path(found[4]).read_text().startswith("text ")
    assert Path(traced.source).parent == Path(found[4]).parent


def test_in_a_blend_a_line_names_the_shard_with_its_folder(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run_dir / "shards", tmp_path / "other")
    config = load_run_config(run_dir)
    data = DataConfig(blend=(f"{run_dir / 'shards'}=1", f"{other}=3"))
    write_run_config(dataclasses.replace(config, data=data), tmp_path)
    assert status_of(main, "--run", tmp_path, "--step", 1) == 0
    shards = dict(re.findall(r"sample (\d): (\S+) document", capsys.readouterr().out))
    assert sorted(shards.values()) == sorted([str(other / "train")] * 3 + [str(run_dir / "shards" / "train")])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--run", "{run}", "--step", 6), "--step is 6; the run has the steps 1 to 5"),
        (("--run", "{run}/text", "--step", 1), "config.toml"),
    ],
)
def test_a_mistake_is_one_sentence(
    run_dir: Path,
    words: tuple[object, ...],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert status_of(main, *(str(word).replace("{run}", str(run_dir)) for word in words)) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith("error: ")

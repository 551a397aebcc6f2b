"""Several folders of shards as one row of samples."""

import dataclasses
import re
import sys

import pytest
import torch

from pretrain.checkpoint.resume import find_resume_point
from pretrain.config.command_line import parse
from pretrain.config.files import build, load_run_config, write_run_config
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import DataConfig, TrainConfig
from pretrain.data.batches import Samples
from pretrain.data.folders import Blend, open_data, open_samples
from titans_mcore.config import TitansConfig
from tokenization.manifest import Manifest

from .jobs import Job
from .tiny_shards import write_shards

pytestmark = pytest.mark.usefixtures("one_process")
SHARES = (0.625, 0.25, 0.125)


@pytest.fixture(scope="module")
def folders(shards, tmp_path_factory):
    """Three folders of different sizes; the second has two train shards."""
    more = [
        write_shards(tmp_path_factory.mktemp("more"), seed=5, documents=9, train_shards=2),
        write_shards(tmp_path_factory.mktemp("few"), seed=6, documents=6),
    ]
    return [shards, *more]


def config_of(folders, shares=SHARES, **data):
    entries = tuple(f"{folder}={share}" for folder, share in zip(folders, shares, strict=True))
    train = TrainConfig(sequence_length=32, global_batch=4, micro_batch=2)
    return RunConfig(TitansConfig(vocab_size=96), DataConfig(blend=entries, **data), train)


def opened(folders, run_dir, shares=SHARES, **data):
    config = config_of(folders, shares, **data)
    return open_samples(config, open_data(config), run_dir)


def alone(folder, index_dir):
    prefixes = Manifest.load(folder).train_prefixes(folder)
    return Samples(prefixes, index_dir, vocab_size=96, sequence_length=32, seed=1234, documents_apart=True)


def folder_of(samples, index):
    return samples.documents(index)[0].prefix.parent


def test_every_folder_has_its_share_at_any_point(folders, tmp_path):
    samples, _ = opened(folders, tmp_path)
    samples.prepare(0, 199)
    came_from = [folder_of(samples, index) for index in range(200)]
    for length in range(1, 200):
        for folder, share in zip(folders, SHARES, strict=True):
            assert abs(came_from[:length].count(folder.resolve()) - share * length) <= 1


def test_a_folder_gives_its_own_samples_in_its_own_order_epoch_after_epoch(folders, tmp_path):
    samples, _ = opened(folders, tmp_path / "blend")
    samples.prepare(0, 199)
    mixed = {folder.resolve(): [] for folder in folders}
    for index in range(200):
        mixed[folder_of(samples, index)].append(samples.micro_batch([index]).tokens[0])
    for folder in folders:
        own, rows = alone(folder, tmp_path / folder.name), torch.stack(mixed[folder.resolve()])
        own.prepare(0, len(rows) - 1)
        assert torch.equal(own.micro_batch(range(len(rows))).tokens, rows)
    assert len(mixed[folders[2].resolve()]) > alone(folders[2], tmp_path / folders[2].name).per_epoch


def test_the_numbers_go_on_where_the_pattern_of_folders_repeats(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("pretrain.data.folders._BLOCK", 16)
    samples = Blend([alone(folder, tmp_path) for folder in folders], SHARES)
    found = [samples._locate(index) for index in range(160)]
    for part, share in enumerate(SHARES):
        assert [place for of, place in found if of == part] == list(range(int(160 * share)))
    assert all(samples._first_number_of(*where) == index for index, where in enumerate(found))


def test_rows_of_a_batch_are_the_samples_and_say_where_documents_begin(folders, tmp_path):
    samples, _ = opened(folders, tmp_path)
    samples.prepare(0, 15)
    batch = samples.micro_batch(range(16))
    for index, row in enumerate(zip(batch.tokens, batch.labels, batch.starts, strict=True)):
        tokens, labels, starts, _ = samples.micro_batch([index])
        starts = torch.zeros_like(tokens, dtype=torch.bool) if starts is None else starts
        assert all(torch.equal(mine, other[0]) for mine, other in zip(row, (tokens, labels, starts), strict=True))
    unmarked, _ = opened(folders, tmp_path, reset_documents=False)
    assert unmarked.micro_batch(range(16)).starts is None


def test_the_held_out_set_is_blended_alike_and_nothing_in_it_comes_twice(folders, tmp_path):
    _, heldout = opened(folders, tmp_path)
    count = heldout.per_epoch
    heldout.prepare(0, count)
    rows = [tuple(row) for row in heldout.micro_batch(range(count + 1)).tokens.tolist()]
    assert len(set(rows[:-1])) == count > 8
    came_from = [folder_of(heldout, index) for index in range(count)]
    assert all(part.prefix.name == "heldout" for index in range(count) for part in heldout.documents(index))
    for folder, share in zip(folders, SHARES, strict=True):
        assert abs(came_from.count(folder.resolve()) - share * count) <= 1


def test_a_blend_of_one_folder_is_that_folder(shards, tmp_path):
    entry = config_of([shards], [3])
    path = dataclasses.replace(entry, data=DataConfig(path=str(shards)))
    assert open_data(entry).fingerprint == open_data(path).fingerprint == Manifest.load(shards).fingerprint
    mine, theirs = (open_samples(config, open_data(config), tmp_path)[0] for config in (entry, path))
    assert torch.equal(mine.micro_batch(range(8)).tokens, theirs.micro_batch(range(8)).tokens)


def test_the_fingerprint_covers_folders_shares_and_their_order(folders):
    def fingerprint(folders, shares):
        return open_data(config_of(folders, shares)).fingerprint

    pair = folders[:2]
    assert fingerprint(pair, ["0.7", "0.3"]) == fingerprint(pair, ["7", "3.0"])
    others = [(pair, ["0.6", "0.4"]), (pair[::-1], ["0.3", "0.7"]), (folders[::2], ["0.7", "0.3"])]
    assert len({fingerprint(*other) for other in [(pair, ["0.7", "0.3"]), *others]}) == 4


def test_folders_of_different_tokenizers_are_refused(shards, tmp_path):
    other = write_shards(tmp_path / "other", tokenizer=b"another tokenizer")
    with pytest.raises(ValueError, match=f"data.blend mixes tokenizers: that of {other} is not that of {shards}"):
        open_data(config_of([shards, other], [1, 1]))


def test_damage_in_any_folder_is_found(shards, tmp_path):
    other = write_shards(tmp_path / "other", seed=8)
    (other / "train.bin").unlink()
    with pytest.raises(ValueError, match=f"{other}/train.bin: missing"):
        open_data(config_of([shards, other], [1, 1]))


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        (["web"], "data.blend has 'web'; write FOLDER=SHARE with a share above 0, as in web=0.7"),
        (["=0.7"], "data.blend has '=0.7'"),
        (["web=much"], "data.blend has 'web=much'"),
        (["web=0"], "data.blend has 'web=0'"),
        (["web=-1"], "data.blend has 'web=-1'"),
        (["web=nan"], "data.blend has 'web=nan'"),
        (["web=1/0"], "data.blend has 'web=1/0'"),
        (["web=1", "web=2"], "data.blend names web twice; add its shares up"),
        (["web=1", "code=1e-5"], "data.blend takes 1.0e-05 of the samples from code; give it at least 0.0001"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_blend_is_named(entries, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        DataConfig(blend=tuple(entries))


def test_one_folder_and_a_blend_together_are_refused():
    with pytest.raises(ValueError, match=r"data\.path and data\.blend both name folders of shards; give one of them"):
        DataConfig(path="web", blend=("code=1",))


@pytest.mark.parametrize("value", ['"web=1"', "[1, 2]", "3"])
def test_another_type_in_the_file_is_named(value):
    import tomllib

    with pytest.raises(ValueError, match=r"data\.blend in run\.toml is .*; it must be a list of texts in quotes"):
        build(tomllib.loads(f"[data]\nblend = {value}"), "run.toml")


def test_a_blend_on_the_command_line_is_kept_with_whole_paths(folders, tiny_toml, tmp_path, monkeypatch):
    toml = tmp_path / "blend.toml"
    toml.write_text(re.sub(r"path = .*", "", tiny_toml.read_text()))
    monkeypatch.chdir(folders[0].parent)
    entries = [f"{folders[0].name}=0.75", f"{folders[1]}=1/4"]
    words = ["--config", str(toml), "--run-dir", str(tmp_path), "--data.blend", *entries, "--train.steps", "3"]
    config = parse(words).config
    assert config.data.blend == (f"{folders[0]}=0.75", f"{folders[1]}=1/4")
    assert config.data.folders == {str(folders[0]): 0.75, str(folders[1]): 0.25}
    assert (config.train.steps, config.model.vocab_size) == (3, 96)
    write_run_config(config, tmp_path / "run")
    assert load_run_config(tmp_path / "run") == config


def test_a_run_on_a_blend_goes_on_with_the_same_shares_and_refuses_others(folders, tiny_toml, tmp_path):
    toml = tmp_path / "blend.toml"
    entries = ", ".join(f'"{folder}={share}"' for folder, share in zip(folders, SHARES, strict=True))
    toml.write_text(re.sub(r"path = .*", f"blend = [{entries}]", tiny_toml.read_text()))

    def train(*more):
        words = ["--config", str(toml), "--run-dir", str(tmp_path / "run"), "--variant", "transformer", *more]
        return Job([sys.executable, "-m", "pretrain.train", *words], tmp_path).wait()

    status, out, err = train("--train.steps", "2")
    assert (status, err) == (0, "")
    assert "done: held-out loss 4." in out
    assert load_run_config(tmp_path / "run").data.blend[1].endswith("=0.25")
    status, out, err = train("--train.steps", "3")
    assert (status, err) == (0, "")
    assert "step-00000002, after step 2" in out
    others = [f"{folder}=1" for folder in folders]
    words = ["--config", str(toml), "--run-dir", str(tmp_path / "run"), "--variant", "transformer"]
    config = parse([*words, "--train.steps", "4", "--data.blend", *others]).config
    with pytest.raises(ValueError, match="data_fingerprint was"):
        find_resume_point(config, open_data(config).fingerprint, tmp_path / "run")

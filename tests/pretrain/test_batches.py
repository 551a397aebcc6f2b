"""Which tokens a step learns from."""

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import DataConfig, TrainConfig
from pretrain.data.batches import Batches, Samples
from pretrain.data.folders import check_shards, keep_tokenizer, open_data
from titans_mcore.config import TitansConfig

from .tiny_shards import BOS, EOS, write_shards

pytestmark = pytest.mark.usefixtures("one_process")
GLOBAL_BATCH, STEPS = 12, 9


def open_samples(shards, index_dir, seed=3):
    return Samples([shards / "train"], index_dir, vocab_size=96, sequence_length=32, seed=seed)


def config_of(micro_batch, steps=STEPS):
    return RunConfig(
        train=TrainConfig(steps=steps, sequence_length=32, global_batch=GLOBAL_BATCH, micro_batch=micro_batch)
    )


def rank_batches(shards, index_dir, *, ranks, micro_batch, steps, seed=3):
    """For each step, the micro-batches of every rank."""
    readers = []
    for rank in range(ranks):
        readers.append(Batches(open_samples(shards, index_dir, seed), config_of(micro_batch), rank, ranks))
    batches = [[reader.fetch(step) for reader in readers] for step in steps]
    for reader in readers:
        reader.close()
    return batches


def samples_of(batches):
    """For each step, its samples in the order in which the ranks go round."""
    return [torch.cat([tokens for turn in zip(*of_ranks, strict=True) for tokens, *_ in turn]) for of_ranks in batches]


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The global batches as one rank sees them; 9 steps of 12 pass the end of an epoch."""
    index_dir = tmp_path_factory.mktemp("index")
    assert open_samples(shards, index_dir).per_epoch < GLOBAL_BATCH * STEPS
    return samples_of(rank_batches(shards, index_dir, ranks=1, micro_batch=GLOBAL_BATCH, steps=range(STEPS)))


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 3), (2, 3), (2, 6), (3, 2), (4, 3)])
def test_global_batches_do_not_depend_on_data_ranks_or_micro_batches(shards, tmp_path, reference, ranks, micro_batch):
    batches = rank_batches(shards, tmp_path, ranks=ranks, micro_batch=micro_batch, steps=range(STEPS))
    assert all(len(of_rank) == GLOBAL_BATCH // ranks // micro_batch for step in batches for of_rank in step)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(samples_of(batches), reference, strict=True))


def test_a_restart_with_another_number_of_ranks_goes_on_with_the_same_batches(shards, tmp_path, reference):
    rank_batches(shards, tmp_path, ranks=1, micro_batch=4, steps=range(5))
    later = rank_batches(shards, tmp_path, ranks=2, micro_batch=2, steps=range(5, STEPS))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(samples_of(later), reference[5:], strict=True))


def test_a_longer_run_sees_the_same_first_batches(shards, tmp_path, reference):
    reader = Batches(open_samples(shards, tmp_path), config_of(GLOBAL_BATCH, steps=10_000), 0, 1)
    assert torch.equal(reader.fetch(0)[0][0], reference[0])
    reader.close()


def test_the_next_step_is_read_while_this_one_computes(shards, tmp_path):
    samples, read = open_samples(shards, tmp_path), []
    monitored = SimpleNamespace(prepare=samples.prepare)
    monitored.micro_batch = lambda indices: (read.extend(indices), samples.micro_batch(indices))[1]
    reader = Batches(monitored, config_of(4), 0, 1)
    for step in range(STEPS - 1):
        reader.fetch(step)
        reader._ahead[step + 1].result()  # what the computation of a step leaves time for
        assert read == list(range((step + 2) * GLOBAL_BATCH))
    reader.fetch(STEPS - 1)
    assert len(read) == STEPS * GLOBAL_BATCH  # nothing is read for a step that does not come
    reader.close()


def test_moving_the_data_does_not_move_the_samples(shards, tmp_path, reference):
    moved = shutil.copytree(shards, tmp_path / "moved")
    batches = rank_batches(moved, tmp_path / "index", ranks=1, micro_batch=GLOBAL_BATCH, steps=range(2))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(samples_of(batches), reference, strict=False))


def test_another_seed_gives_another_order(shards, tmp_path, reference):
    batches = rank_batches(shards, tmp_path, ranks=1, micro_batch=GLOBAL_BATCH, steps=range(1), seed=4)
    assert not torch.equal(samples_of(batches)[0], reference[0])


def test_two_epochs_have_the_same_samples_in_another_order_and_cut(shards, tmp_path):
    samples = open_samples(shards, tmp_path)
    count = samples.per_epoch
    samples.prepare(0, 2 * count - 1)
    first, *_ = samples.micro_batch(range(count))
    second, *_ = samples.micro_batch(range(count, 2 * count))
    assert not torch.equal(first, second)
    # Each epoch goes through all documents once; only what is left over at its end differs.
    difference = torch.bincount(first.flatten(), minlength=96) - torch.bincount(second.flatten(), minlength=96)
    assert difference.abs().sum() <= 2 * 33


def test_a_label_is_the_token_after_its_position(shards, tmp_path):
    samples = open_samples(shards, tmp_path)
    tokens, labels, *_ = samples.micro_batch(range(samples.per_epoch))
    assert tokens.shape == labels.shape == (samples.per_epoch, 32)
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    ends = tokens == EOS
    assert ends.sum() > 5
    assert (labels[ends] == BOS).all()


def test_rows_say_where_documents_begin_inside_them(shards, tmp_path):
    samples = Samples([shards / "train"], tmp_path, vocab_size=96, sequence_length=32, seed=3, documents_apart=True)
    tokens, _, starts, _ = samples.micro_batch(range(samples.per_epoch))
    assert starts is not None
    assert torch.equal(starts[:, 1:], tokens[:, 1:] == BOS)
    assert not starts[:, 0].any()
    whole = next(i for i in range(samples.per_epoch) if not starts[i].any())
    assert samples.micro_batch([whole]).starts is None
    assert open_samples(shards, tmp_path).micro_batch(range(samples.per_epoch)).starts is None


def test_several_shards_are_one_set_of_samples(shards, tmp_path):
    other = write_shards(tmp_path / "other", seed=5)
    pair = [shards / "train", other / "train"]
    samples = Samples(pair, tmp_path / "index", vocab_size=96, sequence_length=32, seed=3)
    alone = [Samples([prefix], tmp_path / "index", vocab_size=96, sequence_length=32, seed=3) for prefix in pair]
    assert samples.per_epoch == sum(one.per_epoch for one in alone)
    together = {tuple(row) for row in samples.micro_batch(range(samples.per_epoch)).tokens.tolist()}
    apart = {tuple(row) for one in alone for row in one.micro_batch(range(one.per_epoch)).tokens.tolist()}
    assert together == apart


def test_a_sample_is_made_of_the_documents_it_names(shards, tmp_path):
    other = write_shards(tmp_path / "other", seed=5)
    pair = [shards / "train", other / "train"]
    samples = Samples(pair, tmp_path / "index", vocab_size=96, sequence_length=32, seed=3)
    datasets = {prefix.resolve(): IndexedDataset(str(prefix)) for prefix in pair}
    samples.prepare(0, 2 * samples.per_epoch - 1)
    for index in range(0, 2 * samples.per_epoch, 3):
        parts = samples.documents(index)
        held = [torch.from_numpy(datasets[p.prefix][p.document][p.start : p.stop].astype("int64")) for p in parts]
        assert torch.equal(torch.cat(held)[:32], samples.micro_batch([index]).tokens[0])


def test_an_index_that_was_left_half_written_is_built_again(shards, tmp_path, reference):
    open_samples(shards, tmp_path)
    (whole,) = [folder for folder in tmp_path.iterdir() if folder.name.startswith("train")]
    partial = whole.rename(tmp_path / f".{whole.name}.partial")
    for file in partial.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    batches = rank_batches(shards, tmp_path, ranks=1, micro_batch=GLOBAL_BATCH, steps=range(1))
    assert torch.equal(samples_of(batches)[0], reference[0])
    assert not [folder for folder in tmp_path.iterdir() if folder.name.startswith(".")]


def test_short_rows_are_the_parts_of_the_same_samples(shards, tmp_path):
    samples = Samples([shards / "train"], tmp_path, vocab_size=96, sequence_length=32, seed=3, documents_apart=True)
    whole = samples.micro_batch(range(samples.per_epoch))
    short = whole.cut(8)
    assert short.tokens.shape == (4 * samples.per_epoch, 8)
    assert torch.equal(short.tokens.reshape(-1, 32), whole.tokens)
    assert torch.equal(short.labels.reshape(-1, 32), whole.labels)  # the last token of a short row is predicted, too
    assert torch.equal(short.starts[:, 1:], (short.tokens == BOS)[:, 1:])
    assert not short.starts[:, 0].any()
    assert whole.cut(32) is whole


def test_both_warm_ups_leave_the_order_of_the_samples_as_it_is(shards, tmp_path, reference):
    warm_ups = {"batch_warmup_from": 4, "batch_warmup_tokens": 1_000, "sequence_warmup_from": 8}
    train = TrainConfig(
        steps=STEPS,
        sequence_length=32,
        global_batch=GLOBAL_BATCH,
        micro_batch=2,
        sequence_warmup_tokens=1_200,
        **warm_ups,
    )
    reader = Batches(open_samples(shards, tmp_path), RunConfig(train=train), 0, 1)
    steps = [[tokens for tokens, *_ in reader.fetch(step)] for step in range(STEPS)]
    reader.close()
    assert [len(step) for step in steps] == [2, 2, 2, 2, 4, 4, 6, 6, 6]
    assert [step[0].shape[1] for step in steps] == [8, 8, 8, 8, 8, 16, 16, 32, 32]
    seen = torch.cat([tokens.reshape(-1, 32) for step in steps for tokens in step])
    assert torch.equal(seen, torch.cat(reference)[: len(seen)])


def run_config(shards: Path, **model) -> RunConfig:
    return RunConfig(model=TitansConfig(vocab_size=96, **model), data=DataConfig(path=str(shards)))


def test_matching_data_is_opened(shards):
    assert open_data(run_config(shards)).tokenizer.vocab_size == 96


def test_shards_are_read_on_first_use_and_again_where_they_may_have_changed(tmp_path):
    shards, run_dir = write_shards(tmp_path / "shards"), tmp_path / "run"
    config = run_config(shards)
    assert "checksums of 4 files" in check_shards(config, open_data(config), run_dir)
    assert "as when this run compared" in check_shards(config, open_data(config), run_dir)
    file = next(shards.glob("train*.bin"))
    content = file.read_bytes()
    file.write_bytes(content)
    os.utime(file, (1, 1))
    assert "checksums of 1 files" in check_shards(config, open_data(config), run_dir)
    file.write_bytes(content[:7] + bytes([content[7] ^ 1]) + content[8:])
    for place in (run_dir, tmp_path / "another run"):
        with pytest.raises(ValueError, match=f"{file}: not the file that the manifest lists"):
            check_shards(config, open_data(config), place)
    unread = dataclasses.replace(config, data=dataclasses.replace(config.data, verify=False))
    assert "contents were not compared" in check_shards(unread, open_data(unread), run_dir)


def test_a_model_with_another_vocabulary_is_refused(shards):
    config = dataclasses.replace(run_config(shards), model=TitansConfig(vocab_size=95))
    with pytest.raises(ValueError, match=r"model\.vocab_size is 95 but the tokenizer of .* has 96 pieces"):
        open_data(config)


def test_shards_that_do_not_match_their_manifest_are_refused(tmp_path):
    folder = write_shards(tmp_path / "shards", documents=8)
    with (folder / "train.bin").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ValueError, match=r"train\.bin"):
        open_data(run_config(folder))


def test_a_missing_path_is_asked_for():
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        open_data(RunConfig())


def test_less_text_than_one_sequence_is_refused(shards, tmp_path):
    with pytest.raises(ValueError, match=r"fewer tokens than one sequence of train\.sequence_length 100000"):
        Samples([shards / "train"], tmp_path, vocab_size=96, sequence_length=100_000, seed=0)


def test_a_run_keeps_the_tokenizer_of_its_data_and_no_other(tmp_path):
    shards, run = tmp_path / "shards", tmp_path / "run"
    write_shards(shards)
    data = open_data(run_config(shards))
    for _ in range(2):
        keep_tokenizer(data, run)
    kept = run / "tokenizer" / "tokenizer.model"
    assert kept.read_bytes() == (shards / "tokenizer.model").read_bytes()
    kept.write_bytes(b"another one")
    with pytest.raises(ValueError, match="is not the tokenizer of"):
        keep_tokenizer(data, run)

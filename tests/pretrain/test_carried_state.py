"""Rows that go on from step to step: a run reads long texts in pieces, learns from each and can be stopped anywhere."""

import dataclasses
import json
import sys

import pytest
import torch

from pretrain.checkpoint.carried import CarriedState
from pretrain.checkpoint.resume import find_resume_point, restore
from pretrain.config.command_line import parse
from pretrain.data.batches import Batches, Samples
from pretrain.data.folders import open_data, open_samples
from pretrain.engine import build_engine, build_model, train_step
from titans_mcore.mixers import MIXERS
from titans_mcore.mixers.attention import AttentionState
from titans_mcore.mixers.branches import BranchesState

from ..matrices import ONE_OF_A_KIND
from .curves_worker import curve
from .jobs import ROOT, Job
from .saving import save
from .tiny_shards import BOS, write_shards

# 20 tokens fill neither the chunks of 8 nor the segments of 16: states are carried with both open.
SETTINGS = ["--data.carry-state", "true", "--train.sequence-length", "20", "--train.micro-batch", "4"]


@pytest.fixture
def configured(tiny_toml):
    def config(*more):
        return parse(["--config", str(tiny_toml), "--run-dir", "unused", *SETTINGS, *more]).config

    return config


@pytest.fixture
def reader(tmp_path):
    """Opens a configuration's batches; closes them at the end."""
    opened = []

    def read(config):
        samples, _ = open_samples(config, open_data(config), tmp_path)
        opened.append(Batches(samples, config, 0, 1))
        return opened[-1]

    yield read
    for batches in opened:
        batches.close()


def first_steps(batches, steps):
    """The only micro-batch of each of so many steps."""
    return [batches.fetch(step)[0] for step in range(steps)]


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_without_learning_four_steps_lose_what_one_row_of_their_length_loses(configured, reader, one_process, variant):
    config = configured("--variant", variant, "--train.recompute", "block")
    engine = build_engine(build_model(config, one_process), config, 1)
    steps, carried = first_steps(reader(config), 4), CarriedState(config.model)
    stepwise = [train_step(engine, [batch], 0.0, carried).loss for batch in steps]

    model, states, in_pieces = engine.module, [], []
    with torch.no_grad():
        for batch in steps:
            losses, states = model(*batch[:3], states=states)
            in_pieces.append(losses)
        tokens, labels = (torch.cat([batch[i] for batch in steps], 1) for i in (0, 1))
        starts = tokens == BOS
        starts[:, 0] = False
        assert starts.any()
        whole = model(tokens, labels, starts)
        anew = model(*steps[3][:3])
    torch.testing.assert_close(torch.cat(in_pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert stepwise == pytest.approx([piece.mean().item() for piece in whole.split(20, 1)], rel=1e-6)
    assert not torch.allclose(anew, in_pieces[3], rtol=1e-5, atol=1e-5)


def cut(state):
    """A state whose past gets no gradient; persistent tokens are no past, every token sees them."""
    if isinstance(state, BranchesState):
        attention = state.attention
        kept = AttentionState(attention.kept.detach(), attention.prefix_keys, attention.prefix_values)
        return BranchesState(state.memory.detach(), kept)
    return state.detach()


@pytest.mark.parametrize("starts", [True, False], ids=["documents", "one text"])
@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_gradients_of_a_step_are_those_of_the_long_row_cut_where_the_step_begins(
    configured, reader, one_process, variant, starts
):
    config = configured("--variant", variant, "--data.reset-documents", str(starts).lower())
    model = build_model(config, one_process).double()
    first, second = first_steps(reader(config), 2)
    _, states = model(*first[:3], states=[])
    losses, _ = model(*second[:3], states=states)
    losses.mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    _, states = model.stream(first.tokens, None, starts=first.starts)
    logits, _ = model.stream(second.tokens, [cut(state) for state in states], starts=second.starts)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), second.labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_a_document_that_begins_with_a_row_knows_nothing_of_the_step_before(configured, one_process, variant):
    model = build_model(configured("--variant", variant), one_process).double()
    tokens = torch.randint(3, 96, (3, 2, 20))
    starts = torch.zeros(2, 20, dtype=torch.bool)
    starts[1, 0] = True
    with torch.no_grad():
        _, states = model(tokens[0], states=[])
        logits, states = model(tokens[1], starts=starts, states=states)
        later, _ = model(tokens[2], states=states)
        alone = model(tokens[1:, 1].reshape(1, 40))
        anew = model(tokens[1])
    torch.testing.assert_close(torch.cat([logits, later], 1)[1:], alone)
    assert not torch.allclose(logits[0], anew[0])


def test_a_state_shares_no_memory_with_parameters_or_other_states(configured, one_process):
    config = configured("--train.sequence-length", "12", "--parallel.zero-stage", "1")
    model = build_model(config, one_process)
    _, states = model(torch.ones(4, 12, dtype=torch.long), states=[])
    places = [tensor.data_ptr() for state in states for tensor in state.state_dict().values() if tensor.numel()]
    assert len(set(places)) == len(places)
    assert not set(places) & {parameter.data_ptr() for parameter in model.parameters()}
    assert not any(tensor.requires_grad for state in states for tensor in state.state_dict().values())


LAYOUTS = {
    "data 2": "--train.micro-batch 1",
    "data 2, ZeRO 0": "--train.micro-batch 2 --parallel.zero-stage 0",
    "data 2, ZeRO 2": "--train.micro-batch 2 --parallel.zero-stage 2",
    "data 2, ZeRO 3": "--train.micro-batch 2 --parallel.zero-stage 3",
    "tensor 2": "--parallel.tensor 2",
    "tensor 2, sequence, recomputed": "--parallel.tensor 2 --parallel.sequence true --train.recompute except_memory",
    "tensor 2, hidden": "--parallel.tensor 2 --parallel.memory-parallel hidden --train.recompute block",
}
# Epochs of 7 steps: the eighth begins anew.
CURVE = "--train.steps 9 --train.sequence-length 60 --optimizer.clip-norm 0.3"


@pytest.mark.slow
def test_any_layout_carries_states_like_one_process(configured, one_process, tiny_toml, tmp_path):
    output = tmp_path / "curves.json"
    variants = [name for name, mixer in MIXERS.items() if mixer.memory]
    runs = [
        f"{variant} {name}: {' '.join(SETTINGS)} --variant {variant} {CURVE} {settings}"
        for variant in variants
        for name, settings in LAYOUTS.items()
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    worker = ["--rdzv-endpoint", "localhost:0", "-m", "tests.pretrain.curves_worker", str(tiny_toml), str(output)]
    status, out, err = Job([sys.executable, *torchrun, *worker, *runs], ROOT).wait(timeout_seconds=550)
    assert status == 0, out + err
    found = json.loads(output.read_text())
    for variant in variants:
        config = configured("--variant", variant, *CURVE.split())
        right = curve(config, tmp_path, one_process)
        apart = dataclasses.replace(config.train, micro_batch=1)
        found[f"{variant} accumulated"] = curve(dataclasses.replace(config, train=apart), tmp_path, one_process)
        for layout in ("accumulated", *LAYOUTS):
            for quantity in ("loss", "grad_norm", "heldout"):
                mine = found[f"{variant} {layout}"][quantity]
                assert mine == pytest.approx(right[quantity], rel=1e-4), (variant, layout, quantity)


def tensors_of(carried):
    """Every tensor that is carried, by micro-batch, block and name."""
    return {
        (place, block, name): tensor
        for place, states in carried.states.items()
        for block, state in enumerate(states)
        for name, tensor in state.state_dict().items()
    }


@pytest.fixture
def stopped(configured, reader, one_process, tmp_path):
    """Runs a configuration for three steps, saves it, and goes on."""

    def run(config):
        batches, carried = reader(config), CarriedState(config.model)
        engine = build_engine(build_model(config, one_process), config, 1)
        results = [train_step(engine, batches.fetch(step), 1e-2, carried) for step in range(3)]
        save(engine, config, "fingerprint", tmp_path, 3, carried)
        results += [train_step(engine, batches.fetch(step), 1e-2, carried) for step in range(3, 6)]
        return results, carried

    return run


@pytest.mark.parametrize("length", ["12", "20"], ids="T{}".format)
@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_a_run_goes_on_from_its_carried_states_bit_for_bit(
    configured, reader, stopped, one_process, tmp_path, variant, length
):
    config = configured("--variant", variant, "--train.micro-batch", "2", "--train.sequence-length", length)
    results, expected = stopped(config)
    point = find_resume_point(config, "fingerprint", tmp_path)
    assert point.progress.step == 3
    batches, carried = reader(config), CarriedState(config.model)
    engine = build_engine(build_model(config, one_process), config, 1)
    restore(engine, config, point, carried)
    assert [train_step(engine, batches.fetch(step), 1e-2, carried) for step in range(3, 6)] == results[3:]
    mine, right = tensors_of(carried), tensors_of(expected)
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[key], right[key]) for key in right)


def test_states_are_not_taken_on_by_other_rows_or_by_a_run_without(configured, stopped, tmp_path):
    config = configured()
    stopped(config)
    with pytest.raises(ValueError, match=r"carry_state was true at tensor 1, .*-batch 4 and is .*-batch 2; start with"):
        find_resume_point(configured("--train.micro-batch", "2"), "fingerprint", tmp_path)
    with pytest.raises(ValueError, match=r"carry_state was true at .* and is False; start with"):
        find_resume_point(configured("--data.carry-state", "false"), "fingerprint", tmp_path)


@pytest.fixture(scope="module")
def strands(shards, tmp_path_factory, one_process):
    """Two epochs of four strands over two shards, by step."""
    other = write_shards(tmp_path_factory.mktemp("other"), seed=5)
    samples = Samples(
        [shards / "train", other / "train"],
        tmp_path_factory.mktemp("index"),
        vocab_size=96,
        sequence_length=5,
        seed=3,
        documents_apart=True,
        strands=4,
    )
    samples.prepare(0, 2 * samples.per_epoch - 1)
    return samples, [samples.micro_batch(range(i, i + 4)) for i in range(0, 2 * samples.per_epoch, 4)]


def test_every_row_goes_on_where_the_same_row_of_the_step_before_ended(strands):
    samples, steps = strands
    epoch = samples.per_epoch // 4
    assert [i for i, batch in enumerate(steps) if batch.begins] == [0, epoch]
    crossings = 0
    for i in set(range(1, 2 * epoch)) - {epoch}:
        for row in range(4):
            before, here = samples.documents(4 * i - 4 + row)[-1], samples.documents(4 * i + row)[0]
            if before.prefix != here.prefix:  # the last tokens of a shard make no sample
                crossings += 1
                assert here.start == 0
                continue
            assert steps[i].tokens[row, 0] == steps[i - 1].labels[row, -1]
            assert here.start == (before.stop if here.document == before.document else 0)
    assert crossings <= 2


def test_an_epoch_has_no_sample_twice_and_the_next_one_has_another_order(strands):
    samples, _ = strands
    first, second = (
        [samples.documents(e * samples.per_epoch + i)[0] for i in range(samples.per_epoch)] for e in (0, 1)
    )
    assert len(set(first)) == len(set(second)) == samples.per_epoch
    assert first != second


def test_a_row_that_goes_on_says_so_of_a_document_at_its_first_token(strands):
    _, steps = strands
    at_first = 0
    for batch in steps:
        begun = batch.tokens == BOS
        if batch.begins:
            begun[:, 0] = False
        assert torch.equal(torch.zeros_like(begun) if batch.starts is None else batch.starts, begun)
        at_first += int(begun[:, 0].sum())
    assert at_first > 0


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (2, 2), (4, 1)])
def test_strands_do_not_depend_on_data_ranks_or_micro_batches(configured, strands, ranks, micro_batch):
    samples, steps = strands
    train = dataclasses.replace(configured().train, micro_batch=micro_batch, sequence_length=5)
    config = dataclasses.replace(configured(), train=train)
    readers = [Batches(samples, config, rank, ranks) for rank in range(ranks)]
    for step in range(5):
        turns = zip(*(reader.fetch(step) for reader in readers), strict=True)
        assert torch.equal(torch.cat([batch.tokens for turn in turns for batch in turn]), steps[step].tokens)
    for reader in readers:
        reader.close()


def test_fewer_samples_than_strands_are_refused_with_the_remedy(shards, tmp_path, one_process):
    with pytest.raises(ValueError, match=r"divides them into 999 strands; lower train\.global_batch or encode more"):
        Samples([shards / "train"], tmp_path, vocab_size=96, sequence_length=32, seed=3, strands=999)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--train.batch-warmup-from 2 --train.batch-warmup-tokens 9 --train.micro-batch 2", "batch_warmup_from 2"),
        ("--train.sequence-warmup-from 5 --train.sequence-warmup-tokens 9", "sequence_warmup_from 5 changes"),
        ("--parallel.context 2 --variant lmm --train.sequence-length 16", r"does not go with parallel\.context 2 yet"),
        ("--variant transformer --model.window 0", r"window 0 keeps all of them; set model\.window"),
    ],
)
def test_what_rows_cannot_go_on_with_is_refused(configured, more, message):
    with pytest.raises(ValueError, match=rf"data\.carry_state .*{message}"):
        configured(*more.split())


def test_a_blend_is_refused(configured):
    config = configured()
    data = dataclasses.replace(config.data, path="", blend=("a=1", "b=1"))
    with pytest.raises(ValueError, match=r"data\.carry_state reads one folder .* data\.blend has 2"):
        dataclasses.replace(config, data=data)

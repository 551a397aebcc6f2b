"""What is evaluated between steps: when, on which rows, and that it is what the commands of evals find afterwards."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from evals.niah.generate import answer, read, value_losses
from evals.niah.templates import score
from evals.position_loss import stretch_ends, summarise
from pretrain.config.command_line import parse
from pretrain.data.batches import MicroBatch
from pretrain.data.folders import keep_tokenizer, open_data, open_samples
from pretrain.engine import build_engine, build_model
from pretrain.evaluate.evaluations import Evaluations, evaluations_by
from pretrain.evaluate.losses import (
    LossByTokensRead,
    heldout_losses,
    tokens_read,
    turns,
)
from pretrain.evaluate.probe import ANSWER_TOKENS, NeedleProbe
from titans_mcore.parallel import Place

from ..matrices import ONE_OF_A_KIND

PROBED = ("--evaluate.probe-shortest", "320", "--evaluate.probe-length", "640", "--evaluate.probe-samples", "3")


@pytest.fixture
def configured(worded_toml):
    def config(*more):
        return parse(["--config", str(worded_toml), "--run-dir", "unused", *more]).config

    return config


@pytest.fixture
def opened(tmp_path, one_process):
    """A configuration's evaluations."""

    def open_evaluations(config):
        data = open_data(config)
        keep_tokenizer(data, tmp_path)
        return Evaluations(config, data, tmp_path, open_samples(config, data, tmp_path)[1])

    return open_evaluations


@pytest.fixture
def engine_of(one_process):
    return lambda config: build_engine(build_model(config, one_process), config, 1)


@pytest.fixture
def probe_of(worded_toml):
    return lambda config: NeedleProbe.open(config, worded_toml.parent / "shards" / "tokenizer.model")


def watched(engine):
    """Shapes of the tokens that the engine is given from now on, and bytes of what it hands on from pass to pass."""
    shapes, carried = [], []

    def note(module, arguments, named, output):
        shapes.append(tuple(named["tokens"].shape))
        carried.append(sum(x.nbytes for state in output[1] for x in state.state_dict().values()))

    engine.module.register_forward_hook(note, with_kwargs=True)
    return shapes, carried


class Planted(torch.nn.Module):
    """Says an answer to each row; its state is how many tokens of them are said."""

    def __init__(self, processor, answers):
        super().__init__()
        self.processor, self.answers = processor, answers

    def forward(self, tokens, labels=None, states=None):
        if labels is not None:
            return torch.ones(tokens.shape), 0
        logits = torch.zeros(*tokens.shape, self.processor.vocab_size())
        for row, text in zip(logits, self.answers, strict=True):
            ids = [*self.processor.encode(text), self.processor.eos_id(), *self.processor.encode("9" * 99)]
            row[0, ids[states]] = 1.0
        return logits, states + 1


def test_every_row_is_counted_once_and_all_ranks_make_as_many_passes():
    for rows in (1, 2, 5, 8, 13):
        for ranks in (1, 2, 3, 8):
            passes = [list(turns(rows, 4, Place(rank, ranks))) for rank in range(ranks)]
            assert len({len(of_rank) for of_rank in passes}) == 1
            counted = [n for of_rank in passes for numbers, real in of_rank for n in np.array(numbers)[real.numpy()]]
            assert sorted(counted) == list(range(rows))
            assert all(len(numbers) <= 4 for of_rank in passes for numbers, _ in of_rank)


def test_few_rows_are_spread_over_the_ranks():
    assert [[numbers for numbers, _ in turns(4, 4, Place(rank, 2))] for rank in range(2)] == [[[0, 1]], [[2, 3]]]


def test_tokens_are_counted_from_where_the_model_begins_anew():
    starts = torch.tensor([[0, 0, 1, 0, 1, 0], [0] * 6]).bool()
    rows = MicroBatch(torch.zeros(2, 6), torch.zeros(2, 6), starts)
    assert tokens_read(rows).tolist() == [[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 5, 6]]
    assert tokens_read(rows._replace(starts=None)).tolist() == [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("length", [1, 2, 3, 100, 128, 129])
def test_buckets_are_those_of_the_report_on_loss_by_position(length):
    losses = torch.rand(4, length, dtype=torch.float64)
    counted = torch.tensor([True, False, True, True])
    found = LossByTokensRead(length)
    for first in range(0, length, 7):
        part = slice(first, first + 7)
        found.add(losses[:, part], torch.arange(1, length + 1)[part], counted)
    ends = stretch_ends(length, None)
    by_position = losses[counted].sum(0).numpy()
    expected = summarise(np.diff(np.cumsum([0.0, *by_position])[[0, *ends]]), ends, 3, None)
    assert found.mean == pytest.approx(expected["loss"])
    assert found.curve()["tokens"] == [bucket["last"] for bucket in expected["buckets"]]
    assert found.curve()["loss"] == pytest.approx([bucket["loss"] for bucket in expected["buckets"]])


def test_a_bucket_that_no_document_reaches_is_left_out():
    found = LossByTokensRead(16)
    found.add(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([1, 2, 3]), torch.tensor([True]))
    assert found.curve() == {"tokens": [1, 2, 4], "loss": [1.0, 2.0, 3.0]}


def test_evaluations_are_a_function_of_the_step(configured):
    def due(*more):
        config = configured("--train.steps", "12", *more)
        return [s for s in range(1, 13) if evaluations_by(s, config) > evaluations_by(s - 1, config)]

    assert due() == []
    assert due("--evaluate.every-steps", "5") == [5, 10]
    assert due("--evaluate.every-tokens", "128") == list(range(1, 13))  # a step has 128
    assert due("--evaluate.every-tokens", "300") == [3, 5, 8, 10, 12]
    assert due("--evaluate.every-tokens", "64") == list(range(1, 13))
    # Steps of 2 and then of 4 samples.
    warm = ("--train.batch-warmup-from", "2", "--train.batch-warmup-tokens", "250")
    assert due("--evaluate.every-tokens", "256", *warm) == [4, 6, 8, 10, 12]


def test_haystacks_wait_for_their_turn_and_come_at_the_end(configured, opened, engine_of):
    rare = ("--train.steps", "8", "--evaluate.every-steps", "2", "--evaluate.long-every", "3")
    config = configured(*PROBED, *rare, "--variant", "transformer")
    evaluations, engine = opened(config), engine_of(config)
    found = {
        step: [values.get("name", kind) for kind, values in evaluations.after(engine, step)] for step in range(1, 9)
    }
    often = ["heldout", "heldout"]
    assert {step: kinds for step, kinds in found.items() if kinds} == {
        2: often,
        4: often,
        6: [*often, "niah_single_1"],
        8: [*often, "niah_single_1"],
    }


def test_an_evaluation_due_at_a_step_that_is_passed_over_comes_before_it(configured, opened, engine_of):
    config = configured("--train.steps", "8", "--evaluate.every-steps", "4")
    evaluations, engine = opened(config), engine_of(config)
    assert not evaluations.after(engine, 3)
    assert evaluations.after(engine, 3, following=6)
    assert not evaluations.after(engine, 6, following=8)
    assert evaluations.after(engine, 7, following=9)  # the last step is passed over


def test_without_held_out_rows_nothing_is_evaluated(configured, opened):
    config = configured("--evaluate.heldout-sequences", "0", "--evaluate.every-steps", "1")
    assert opened(config).after(None, 20) == opened(config).after(None, 3) == []


def test_the_held_out_loss_is_the_mean_over_its_rows_documents_apart(configured, one_process, tmp_path):
    config = configured("--evaluate.heldout-sequences", "5")
    model = build_model(config, one_process)
    _, heldout = open_samples(config, open_data(config), tmp_path)
    rows = heldout.micro_batch(range(5))
    with torch.no_grad():
        losses = model(rows.tokens, rows.labels, rows.starts)
    found = heldout_losses(model, heldout, config)
    assert found.mean == pytest.approx(float(losses.mean()), rel=1e-6)
    assert rows.starts is not None
    first = losses[tokens_read(rows) == 1]
    assert len(first) > 5
    assert found.curve()["loss"][0] == pytest.approx(float(first.mean()), rel=1e-6)
    assert model.training


@pytest.mark.parametrize("variant", ["mac", "mal"])
def test_haystacks_are_answered_as_the_evaluation_of_a_checkpoint_answers(configured, engine_of, probe_of, variant):
    config = configured("--variant", variant, "--model.init-std", "0.2", *PROBED)
    engine, probe = engine_of(config), probe_of(config)
    samples = [probe.builder.build(probe._name(320, number)) for number in range(3)]
    with torch.no_grad():
        mine = probe.ask(engine, samples)
    stream, end = engine.module.stream, probe.processor.eos_id()
    prompts = torch.from_numpy(np.stack([sample.prompt for sample in samples])).long()
    logits, states = read(stream, prompts.split(50, 1), lambda tokens: None)
    ids = answer(partial(stream, last=1), logits, states, ANSWER_TOKENS, end, lambda: None)
    assert mine.texts == [probe.processor.decode(row) for row in ids]
    assert len(set(mine.texts)) > 1  # what is asked matters
    losses = value_losses(stream, logits, states, [sample.value_ids for sample in samples])
    assert (mine.losses_BT * mine.real_BT).sum(1).tolist() == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("variant", ONE_OF_A_KIND)
def test_reading_takes_no_more_memory_the_longer_the_haystack(configured, engine_of, probe_of, variant):
    config = configured("--variant", variant, *PROBED)
    engine, probe = engine_of(config), probe_of(config)
    peaks = []
    for length in config.evaluate.probe_lengths:
        shapes, carried = watched(engine)
        with torch.no_grad():
            probe.ask(engine, [probe.builder.build(probe._name(length, 0))])
        assert max(shapes) == (1, 32)  # as a row in training
        peaks.append(max(carried))
    assert peaks[0] == peaks[1]


def test_the_answers_loss_is_that_of_the_values_digits_in_one_pass(configured, engine_of, probe_of):
    config = configured("--variant", "mac", *PROBED)
    engine, probe = engine_of(config), probe_of(config)
    found = probe.run(engine)
    losses = []
    for number in range(3):
        sample = probe.builder.build(probe._name(640, number))
        text = list(sample.value_ids)
        assert probe.processor.decode(text).strip() == sample.value
        whole = torch.tensor([[*sample.prompt.tolist(), *text]])
        with torch.no_grad():
            logits = engine.module(whole[:, :-1])[0, -len(text) :]
        losses.append(F.cross_entropy(logits, torch.tensor(text), reduction="none"))
    assert found["lengths"] == [320, 640]
    assert found["answer_loss"][1] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert found["accuracy"] == [0, 0]


def test_needles_that_are_found_are_counted_by_length(configured, one_process, probe_of):
    probe = probe_of(configured(*PROBED, "--evaluate.probe-samples", "5", "--train.micro-batch", "4"))
    samples = [probe.builder.build(probe._name(320, number)) for number in range(5)]
    assert len({sample.value for sample in samples}) == 5
    assert [sample.name.depth for sample in samples] == [0, 25, 50, 75, 100]
    answers = [f"it is {sample.value}" for sample in samples[:3]] + ["it is 1", ""]
    asked = probe.ask(Planted(probe.processor, answers), samples)
    assert [text.strip() for text in asked.texts] == answers  # up to the end token
    right = [score(text, sample.value).substring for text, sample in zip(asked.texts, samples, strict=True)]
    assert right == [True, True, True, False, False]
    counted = torch.tensor([True, True, False, True, True])
    found, of, loss, tokens = probe._sums(samples, asked, counted).tolist()
    assert (found, of) == (2, 4)
    assert loss == tokens == sum(len(s.value_ids) for s in samples) * 4 / 5


def test_logits_that_are_not_finite_find_nothing_and_end_nothing(configured, engine_of, probe_of):
    config = configured("--variant", "transformer", *PROBED)
    engine = engine_of(config)
    with torch.no_grad():
        engine.module.final_norm.weight.fill_(math.nan)
    found = probe_of(config).run(engine)
    assert found["accuracy"] == [0, 0]
    assert all(map(math.isnan, found["answer_loss"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--evaluate.every-steps 2 --evaluate.every-tokens 9", r"every_tokens is 9 and .*every_steps 2; give one"),
        ("--evaluate.probe-length 5000", r"probe_length 5000 does not come from .*probe_shortest 4096.*; take 4096"),
        ("--evaluate.probe-length 12288", r"by doubling; take 8192, or another shortest length"),
        ("--evaluate.probe-length 64", r"by doubling; take 4096"),
        ("--evaluate.long-every 0", r"evaluate\.long_every is 0; it must be at least 1"),
        ("--evaluate.probe-length 4096 --variant mag --model.window 0", r"probe_length 4096 .*; set model\.window"),
        ("--train.evaluate-every-steps 3", r"unknown setting .*; did you mean --evaluate\.every-steps\?"),
        ("--data.heldout-sequences 3", r"did you mean --evaluate\.heldout-sequences\?"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_remedy(configured, more, message):
    with pytest.raises(ValueError, match=message):
        configured(*more.split())


def test_the_probes_lengths_double(configured):
    assert configured().evaluate.probe_lengths == ()
    assert configured("--evaluate.probe-length", "4096").evaluate.probe_lengths == (4096,)
    assert configured("--evaluate.probe-length", "32768").evaluate.probe_lengths == (4096, 8192, 16384, 32768)


def test_what_cannot_be_read_is_refused_before_the_first_step(configured, opened, worded_toml, tiny_toml):
    short = ("--evaluate.probe-shortest", "100", "--evaluate.probe-length", "100")
    with pytest.raises(ValueError, match=r"probe_shortest 100 is too short for the words .* take 400"):
        opened(configured(*short))


def test_a_tokenizer_without_words_is_refused(tiny_toml, opened):
    config = parse(["--config", str(tiny_toml), "--run-dir", "unused", "--evaluate.probe-length", "4096"]).config
    with pytest.raises(ValueError, match=r"probe_length asks questions in words, and tokenizer .* not a sentencepiece"):
        opened(config)

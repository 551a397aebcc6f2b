"""Controls take away what they say and nothing else, on every variant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.command_line import EvaluationError
from evals.models import EvalModel, load_model
from evals.niah import NiahSettings
from evals.niah.controls import check_controls, controlled, window_of, without_memory
from evals.niah.generate import repeat
from evals.niah.run import evaluate
from evals.niah.samples import SampleBuilder, SampleKey
from tests.mixers.test_decoding import recorded
from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS

from .conftest import MakeRun
from .planted import plant

WITH_MEMORY = [name for name, mixer in MIXERS.items() if mixer.memory]
ALL = ("needle_absent", "memory_reset", "memory_off", "window_only", "random_init")


def memories(model: EvalModel, states: list) -> list[torch.Tensor]:
    """Weights of every block's memory."""
    found = []
    for state in states:
        memory = getattr(state, "written", None) or getattr(state, "memory", state)
        found += getattr(memory, "memory", memory).weights
    return found


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 360, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", WITH_MEMORY)
@torch.inference_mode()
def test_a_reset_memory_is_that_of_a_new_sequence_and_attention_keeps_its_window(
    make_run: MakeRun, variant: str
) -> None:
    model = load_model(make_run(variant))
    question = tokens(7, seed=1)
    _, long = model.stream(tokens(16 * 11), None, 1)
    reset, states = model.stream(question, without_memory(long, model.config), 1)
    fresh, fresh_states = model.stream(question, None, 1)
    unreset, _ = model.stream(question, long, 1)
    assert not torch.allclose(reset, unreset, atol=1e-4)
    if not MIXERS[variant].attention:  # nothing but the memory
        assert torch.equal(reset, fresh)
    else:
        assert not torch.allclose(reset, fresh, atol=1e-4)
    # The first block's memory has read the question's tokens alone, whatever stood before (MAC writes what attention
    # says, which has seen the window).
    if variant != "mac":
        own, new = (memories(model, [each[0]]) for each in (states, fresh_states))
        for weight, other in zip(own, new, strict=True):
            torch.testing.assert_close(weight, other)


@pytest.mark.parametrize("variant", WITH_MEMORY)
@torch.inference_mode()
def test_a_memory_that_is_off_stays_at_its_beginning_and_comes_back(make_run: MakeRun, variant: str) -> None:
    model = load_model(make_run(variant))
    before, on = model.stream(tokens(100), None, 1)
    with controlled(model, "memory_off") as off:
        logits, states = off.stream(tokens(100), None, 1)
        learned = [p for name, p in model.network.named_parameters() if "initial_weights" in name]  # type: ignore[attr-defined]
        for weight, beginning in zip(memories(model, states), learned, strict=True):
            torch.testing.assert_close(weight[0], beginning, rtol=0, atol=0)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits, before, atol=1e-4)
    assert torch.equal(model.stream(tokens(100), None, 1)[0], before)
    assert not torch.equal(memories(model, on)[0][0], learned[0])


@torch.inference_mode()
def test_random_weights_are_not_the_trained_ones_and_always_the_same(make_run: MakeRun) -> None:
    model = load_model(make_run("mag"))
    with controlled(model, "random_init") as first, controlled(model, "random_init") as second:
        one, two = (each.stream(tokens(20), None)[0] for each in (first, second))
    assert torch.equal(one, two)
    assert not torch.allclose(one, model.stream(tokens(20), None)[0], atol=1e-3)


@torch.inference_mode()
def test_a_repeated_state_goes_on_like_the_one_it_came_from(make_run: MakeRun) -> None:
    for variant in MIXERS:
        model = load_model(make_run(variant))
        _, states = model.stream(tokens(77), None, 1)
        alone, _ = model.stream(tokens(9, seed=1), states)
        together, _ = model.stream(tokens(9, seed=1).expand(3, -1), repeat(states, 3))
        for row in together:
            torch.testing.assert_close(row, alone[0])
        again, _ = model.stream(tokens(9, seed=1), states)
        assert torch.equal(again, alone)


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_answers_are_the_same_from_a_captured_decoder(make_run: MakeRun, variant: str, tmp_path: Path) -> None:
    """A graph serves several batches, those whose memory is reset or off as well."""
    model, graphs, reports = load_model(make_run(variant)), list[Any](), list[Any]()
    for name in ("one_by_one", "captured"):
        settings = NiahSettings(
            Path(),
            tmp_path / name,
            lengths=(420,),
            depths=2,
            samples=2,
            batch=2,
            max_new_tokens=40,
            controls=("memory_reset", "memory_off"),
        )
        evaluate(model, settings)
        lines = (tmp_path / name / "niah.jsonl").read_text().splitlines()
        reports.append([json.loads(line)["answer_ids"] for line in lines])
        model.decoder.capture = lambda run: graphs.append(run) or recorded(run)
    assert reports[0] == reports[1]
    assert len({tuple(ids) for ids in reports[0]}) > 2
    assert 0 < len(graphs) < len(reports[0]) // 2


def test_prompts_without_needle_and_of_one_window(tokenizer: Path) -> None:
    processor = plant(tokenizer, str).tokenizer.processor
    builder = SampleBuilder(processor, 32, window=250)
    main, absent, window = (
        builder.build(SampleKey("niah_single_1", 2000, 100.0, 0, 0, control))
        for control in ("none", "needle_absent", "window_only")
    )
    assert main.value == absent.value == window.value
    assert main.tokens == absent.tokens == 2000 - 32
    text = processor.decode(absent.prompt.tolist())
    assert main.value not in text
    assert text.count(main.needle_key) == 2
    assert window.tokens == 250
    kept = window.tokens - 80  # the opening stays
    assert (window.prompt[-kept:] == main.prompt[-kept:]).all()
    far = builder.build(SampleKey("niah_single_1", 2000, 0.0, 0, 0, "window_only"))
    assert far.value not in processor.decode(far.prompt.tolist())


@pytest.mark.parametrize(
    ("task", "others"),
    [("niah_multikey_1", 3), ("niah_multikey_2", None), ("niah_multivalue", 0), ("niah_multiquery", 0)],
)
def test_needles_that_are_asked_for_are_absent_and_others_stay(tokenizer: Path, task: str, others: int | None) -> None:
    processor = plant(tokenizer, str).tokenizer.processor
    builder = SampleBuilder(processor, 32)
    main, absent = (builder.build(SampleKey(task, 2_500, 50.0, 0, 0, control)) for control in ("none", "needle_absent"))
    assert main.tokens == absent.tokens == 2_500 - 32
    assert (main.needle_key, main.value) == (absent.needle_key, absent.value)
    text, whole = (processor.decode(sample.prompt.tolist()) for sample in (absent, main))
    assert all(value not in text and value in whole for value in main.values)
    if others is not None:
        assert text.count("One of the special") == others == whole.count("One of the special") - len(main.values)
    assert text.split("\n")[-1] == whole.split("\n")[-1]


def test_controls_are_run_and_reported_apart(tokenizer: Path, tmp_path: Path) -> None:
    settings = NiahSettings(
        Path(), tmp_path, lengths=(900,), depths=3, controls=("needle_absent", "window_only"), max_new_tokens=32
    )
    report = evaluate(plant(tokenizer, lambda value: value or "7654321"), settings)
    assert report is not None
    rows = {row["control"]: (row["accuracy"], row["wrong_value_rate"], row["n"]) for row in report["by_length"]}
    # Of three depths the last window of 512 tokens has one.
    assert rows == {"none": (1, 0, 3), "needle_absent": (0, 1, 3), "window_only": (1 / 3, 2 / 3, 3)}
    assert report["accuracy_by_length"] == {"niah_single_1": {"900": 1.0}}


@pytest.mark.slow
@pytest.mark.parametrize("variant", WITH_MEMORY)
def test_every_control_runs_on_every_variant(make_run: MakeRun, tmp_path: Path, variant: str) -> None:
    settings = NiahSettings(Path(), tmp_path, ("pk", "w"), (700,), depths=2, controls=ALL, max_new_tokens=6)
    report = evaluate(load_model(make_run(variant)), settings)
    assert report is not None
    losses = {row["control"]: row["value_loss"] for row in report["by_length"] if row["task"] == "niah_single_1"}
    assert set(losses) == {"none", *ALL}
    assert len(set(losses.values())) == len(losses), "two controls did the same"
    assert (tmp_path / "niah_by_length.png").is_file()


def test_a_control_that_means_nothing_here_is_refused() -> None:
    transformer = TitansConfig(variant="transformer", window=0)
    for control in ("memory_reset", "memory_off"):
        with pytest.raises(EvaluationError, match=f"--controls {control}: variant transformer has no memory"):
            check_controls((control,), transformer)
    with pytest.raises(EvaluationError, match="window is the whole text"):
        check_controls(("window_only",), transformer)
    check_controls(ALL, TitansConfig(variant="lmm"))
    windows = {v: window_of(TitansConfig(variant=v, segment_length=64, window=128)) for v in MIXERS}  # type: ignore[arg-type]
    assert {v: window for v, window in windows.items() if window} == {
        "mac": 64,
        "mag": 128,
        "mal": 128,
        "transformer": 128,
    }

"""Fine-tuning on answers: which tokens count, that it learns them and writes less for it, a folder that works alone."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import finetune
from evals.babilong.training_data import TrainingDataSettings as StorySettings
from evals.babilong.training_data import documents as story_documents
from evals.command_line import EvaluationError
from evals.documents import Document, read_documents, write_documents
from evals.models import load_model
from evals.niah.training_data import TrainingDataSettings, documents
from titans_mcore.hf.convert import export
from titans_mcore.hf.exported import open_model, open_tokenizer
from titans_mcore.hf.verify import verify
from titans_mcore.mixers.neural_memory import NeuralMemory
from titans_mcore.mixers.parts import steps_of_memories

from .conftest import MakeRun

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate: pip install 'titans-mcore[evals]'")

LEARNABLE = [
    Document(f"the magic number is {value}.", [(20, 20 + len(value))]) for value in ("27", "345") for _ in "abcd"
]


@pytest.fixture(scope="module")
def run(make_run: MakeRun) -> Path:
    return make_run("mag", num_layers=1, memory_network="plain", memory_depth=1)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export(run, folder, skip_proof=True)
    return folder


@pytest.fixture
def tuned(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(documents: list[Document] = LEARNABLE, **settings: Any) -> Path:
        write_documents(tmp_path / "documents.jsonl", documents)
        output = tmp_path / "-".join(["tuned", *map(str, settings.values())])
        small = {"steps": 30, "batch": 2, "validation": 2, **settings}
        finetune.finetune(finetune.FinetuneSettings(exported, tmp_path / "documents.jsonl", output, **small))
        return output

    return make


def test_needles_answers_are_their_values_and_stories_answers_their_targets(babi: Path) -> None:
    settings = TrainingDataSettings(
        Path("x.jsonl"), documents=50, tasks=("pk", "mv", "mq", "mk1"), other_words=1.0, questions=3
    )
    for text, answers in documents(settings):
        said = [text[start:end] for start, end in answers]
        assert said == re.findall(r"^What .* mentioned in the provided text (?:is|are)( .+)$", text, re.MULTILINE)
    for text, answers in story_documents(StorySettings(Path("x.jsonl"), babi, documents=50, questions=3)):
        said = re.findall("\nAnswer: .+", text.split("<context>", 1)[1])
        assert [text[start:end] for start, end in answers] == said
        assert len(said) == 3


def test_exactly_the_tokens_of_answers_count(exported: Path) -> None:
    tokenizer = open_tokenizer(exported)
    for document in documents(TrainingDataSettings(Path("x.jsonl"), documents=20, questions=2)):
        row = finetune._row(document, tokenizer)
        counted = row["labels"] != -100
        assert torch.equal(row["labels"][counted], row["input_ids"][counted])
        answers = "".join(document.text[start:end] for start, end in document.answers)
        assert tokenizer.decode(row["labels"][counted]).replace(" ", "") == answers.replace(" ", "")
    whole = finetune._row(Document("the grass is special"), tokenizer)
    assert torch.equal(whole["labels"][1:], whole["input_ids"][1:])


def test_it_learns_the_answers_into_a_folder_that_works_alone(tuned, exported: Path) -> None:
    folder = tuned([LEARNABLE[0]] * 8, learning_rate=2e-2)
    assert verify(folder).compared
    before, after = load_model(exported), load_model(folder)
    row = finetune._row(LEARNABLE[0], open_tokenizer(folder))
    counted = row["labels"] != -100
    said = [model.stream(row["input_ids"][None], None)[0][0, :-1].argmax(-1)[counted[1:]] for model in (before, after)]
    assert torch.equal(said[1], row["labels"][counted])
    assert not torch.equal(said[0], said[1])
    assert after.trained_length == len(row["labels"])


def test_a_write_cost_has_memories_write_less(tuned) -> None:
    def written(folder: Path) -> float:
        model, tokenizer = open_model(folder), open_tokenizer(folder)
        with steps_of_memories() as steps, torch.no_grad():
            model(torch.tensor([tokenizer.encode(LEARNABLE[0].text)]))
        return float(torch.cat([theta.flatten() for theta in steps]).mean())

    free, costly = (written(tuned(write_cost=cost, learning_rate=1e-2)) for cost in (0.0, 100.0))
    assert costly < 0.5 * free


def test_the_steps_of_every_memory_are_seen_and_only_meanwhile(make_run: MakeRun) -> None:
    model = load_model(make_run("lmm"))
    ids = torch.randint(3, 99, (2, 40))
    _, states = model.stream(ids, None)
    with steps_of_memories() as steps:
        model.stream(ids, states)
    model.stream(ids, states)
    assert [tuple(theta.shape) for theta in steps] == [(2, 40, 2, 2)] * 2
    with steps_of_memories() as steps:
        load_model(make_run("deltanet")).stream(ids, None)
    assert [beta.shape[:2] for beta in steps] == [(2, 40)] * 2


@pytest.mark.parametrize("margin", [0.0, 0.9])
def test_a_step_counts_with_all_that_momentum_makes_of_it_and_where_its_gate_is_closed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, margin: float
) -> None:
    found, usual = [], NeuralMemory._gates

    def gates(self: NeuralMemory, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found.append(usual(self, x))
        return found[-1]

    monkeypatch.setattr(NeuralMemory, "_gates", gates)
    with steps_of_memories() as steps, torch.no_grad():
        load_model(make_run("lmm", gate_margin=margin)).stream(torch.randint(3, 99, (2, 40)), None)
    for step, (theta, eta, _) in zip(steps, found, strict=True):
        assert float(eta.mean()) > 0.1
        closed = theta == 0
        assert bool(closed.any()) == bool(margin)
        uncut = (theta + margin) / (1 + margin)
        torch.testing.assert_close(step[~closed], (uncut / (1 - eta))[~closed])
        assert bool((step[closed] > 0).all())
        assert bool((step <= uncut / (1 - eta) * (1 + 1e-6)).all())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: JSONDecodeError"),
        ("[]", "line 2: TypeError"),
        ('{"txt": "a"}', "line 2: KeyError: 'text'"),
        ('{"text": "abc", "answers": [[1, 9]]}', r"line 2: ValueError: answers \[\(1, 9\)\] of 3 characters"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "fine"}) + "\n" + line + "\n")
    with pytest.raises(EvaluationError, match=said):
        list(read_documents(file))


def test_what_cannot_be_is_said_before_anything_is_read(tuned, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"--documents .* has 8, and --validation takes 8 of them; give more"):
        tuned(validation=8)
    with pytest.raises(EvaluationError, match=r"--documents .*, line 2: no token of it counts; give its answers"):
        tuned([LEARNABLE[0], Document("the grass is green", []), *LEARNABLE])
    with pytest.raises(EvaluationError, match="--write-cost is -1; give at least 0"):
        tuned(write_cost=-1)
    with pytest.raises(EvaluationError, match=r"--documents .*none.jsonl: cannot be read \(No such file"):
        finetune.finetune(finetune.FinetuneSettings(exported, tmp_path / "none.jsonl", tmp_path / "x"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").touch()
    write_documents(tmp_path / "d.jsonl", LEARNABLE)
    settings = finetune.FinetuneSettings(exported, tmp_path / "d.jsonl", tmp_path / "mine", validation=1)
    with pytest.raises(EvaluationError, match="--output: "):
        finetune.finetune(settings)

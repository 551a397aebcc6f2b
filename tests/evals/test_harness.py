"""The paper's nine tasks through lm-eval's official task files: planted models, a run and its export, faults."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evals.command_line import EvaluationError
from evals.harness import HarnessSettings, run
from evals.harness.run import summarise
from evals.harness.tasks import TASKS
from evals.models import EvalModel, load_model

from .conftest import spoil_code
from .harness_data import GOLD, ROWS, write_rows
from .planted import plant

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[evals]'")

PAPER_COLUMNS = ["Wiki ppl", "LMB ppl", "LMB", "PIQA", "Hella", "Wino", "ARC-e", "ARC-c", "SIQA", "BoolQ"]


class Reader:
    """Expects a text of its own that begins as what it has read: with certainty, or certainly not."""

    def __init__(self, processor: Any, texts: list[str], sign: float) -> None:
        self.texts = [processor.encode(text, add_bos=True) for text in texts]
        self.vocabulary, self.sign = processor.vocab_size(), sign

    def stream(self, tokens: Tensor, states: Any, last: int | None = None) -> tuple[Tensor, Any]:
        read = [[] for _ in tokens] if states is None else states
        logits = torch.zeros(*tokens.shape, self.vocabulary)
        for row, new in enumerate(tokens.tolist()):
            for position, token in enumerate(new):
                read[row] = [*read[row], token]
                for text in self.texts:
                    if text[: len(read[row])] == read[row] and len(text) > len(read[row]):
                        logits[row, position, text[len(read[row])]] = 30.0 * self.sign
        return logits, read


def evaluate(monkeypatch: pytest.MonkeyPatch, model: EvalModel, tmp_path: Path, **settings: Any) -> dict[str, Any]:
    monkeypatch.setattr("evals.models.load_model", lambda *_, **__: model)
    data = write_rows(tmp_path / "rows")
    return run.evaluate(HarnessSettings(Path("planted"), tmp_path / "out", data=data, piece=7, batch=3, **settings))


def planted(tokenizer: Path, sign: float) -> EvalModel:
    model = plant(tokenizer, str)
    reader = Reader(model.tokenizer.processor, GOLD, sign)
    return EvalModel(reader, model.config, model.tokenizer, "planted", "0" * 64)


def values(report: dict[str, Any]) -> dict[str, float]:
    return {column["title"]: column["value"] for column in report["columns"]}


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 100.0), (-1.0, 0.0)])
def test_oracle_answers_everything_and_its_opposite_nothing(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Path, tmp_path: Path, sign: float, expected: float
) -> None:
    tasks = ("lambada_openai", "piqa", "winogrande", "social_iqa", "boolq")
    found = values(evaluate(monkeypatch, planted(tokenizer, sign), tmp_path, tasks=tasks, limit=1))
    assert list(found) == PAPER_COLUMNS
    assert [found[title] for title in ("LMB", "PIQA", "Wino", "SIQA", "BoolQ")] == [expected] * 5
    assert (found["LMB ppl"] < 1.001) == (sign > 0)
    assert [found[title] for title in ("Wiki ppl", "Hella", "ARC-e", "ARC-c")] == [None] * 4
    assert json.loads((tmp_path / "out" / "harness.json").read_text())["average"]["value"] is None
    cells = (tmp_path / "out" / "harness.md").read_text().splitlines()[2].split("|")[1:-1]
    assert [cell.strip() == "" for cell in cells] == [True, *[False] * 3, True, False, True, True, False, False, True]


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary_a_token(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Path, tmp_path: Path
) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    model = planted(tokenizer, 0.0)
    wiki = evaluate(monkeypatch, model, tmp_path, tasks=("wikitext",), max_length=6)["columns"][0]
    tokens = sum(len(model.tokenizer.processor.encode(wikitext_detokenizer(row))) for row in ROWS["wikitext"])
    words = sum(len(re.split(r"\s+", row["page"])) for row in ROWS["wikitext"])
    assert wiki["n"] == 2
    assert math.log(wiki["value"]) == pytest.approx(tokens * math.log(360) / words)


def test_a_run_its_export_and_lm_evals_own_model_give_one_table(
    mac_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    from titans_mcore.hf.convert import export
    from titans_mcore.hf.exported import open_model, open_tokenizer

    folder = tmp_path / "hf"
    export(mac_run, folder, skip_proof=True)
    ran = spoil_code(folder)
    data = write_rows(tmp_path / "rows")
    shared: dict[str, Any] = {"data": data, "max_length": 24}
    native = run.evaluate(HarnessSettings(mac_run, tmp_path / "native", piece=16, batch=3, **shared))
    exported = run.evaluate(HarnessSettings(folder, tmp_path / "exported", **shared))
    theirs: dict[str, Any] = {}
    for task in TASKS:
        # transformers' tokenizer puts a start token before every text; a window of wikitext brings its own.
        language_model = HFLM(
            pretrained=open_model(folder), tokenizer=open_tokenizer(folder), max_length=24, batch_size=2,
            add_bos_token=task != "wikitext",
        )  # fmt: skip
        monkeypatch.setattr("evals.harness.language_model.NativeLM", lambda *_, own=language_model: own)
        report = run.evaluate(HarnessSettings(folder, tmp_path / "theirs", tasks=(task,), **shared))
        theirs |= {column["title"]: column for column in report["columns"] if column["n"]}
    for one, other in zip(native["columns"], exported["columns"], strict=True):
        for found in (other, theirs[one["title"]]):
            assert one["n"] == found["n"] >= 2
            assert one["value"] == pytest.approx(found["value"], rel=1e-4), one["title"]
            assert one["stderr"] == pytest.approx(found["stderr"], rel=1e-3), one["title"]
    assert native["average"]["value"] == pytest.approx(exported["average"]["value"], rel=1e-6)
    assert not ran.exists()


def test_standard_errors_are_those_of_the_documents() -> None:
    generator = np.random.default_rng(0)
    hits = (generator.random(400) < 0.3).astype(float)
    words = generator.integers(50, 500, 400)
    loss = 3.0 + 0.2 * generator.standard_normal(400)
    documents = [{"acc": hit} for hit in hits]
    pages = [{"word_perplexity": (-float(a * b), int(b))} for a, b in zip(loss, words, strict=True)]
    report = summarise({"piqa": documents, "wikitext": pages})
    by_title = {column["title"]: column for column in report["columns"]}
    piqa, wiki = by_title["PIQA"], by_title["Wiki ppl"]
    assert piqa["value"] == pytest.approx(100 * hits.mean())
    assert piqa["stderr"] == pytest.approx(100 * hits.std(ddof=1) / 20)
    drawn = generator.integers(0, 400, (2000, 400))
    resampled = np.exp((loss * words)[drawn].sum(1) / words[drawn].sum(1))
    assert wiki["value"] == pytest.approx(math.exp((loss * words).sum() / words.sum()))
    assert wiki["stderr"] == pytest.approx(resampled.std(), rel=0.1)


def test_faults_are_one_sentence(mac_run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows")
    with pytest.raises(EvaluationError, match=r"--tasks mmlu; give some of wikitext"):
        HarnessSettings(mac_run, tmp_path, tasks=("piqa", "mmlu"))
    (data / "piqa.jsonl").write_text('{"goal": "a", "label": 0}\n')
    with pytest.raises(EvaluationError, match=r"cannot evaluate piqa .*; compare its rows with the hub's"):
        run.evaluate(HarnessSettings(mac_run, tmp_path / "out", data=data, tasks=("piqa",)))
    (data / "piqa.jsonl").write_text("goal\n")
    with pytest.raises(EvaluationError, match="its first line is not a JSON object"):
        run.evaluate(HarnessSettings(mac_run, tmp_path / "out", data=data))
    (data / "boolq.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"boolq.jsonl is missing; write the validation split of boolq"):
        run.evaluate(HarnessSettings(mac_run, tmp_path / "out", data=data, tasks=("boolq",)))
    assert not (tmp_path / "out").exists()


def test_loaded_model_is_scored_by_whole_texts_alone(mac_run: Path) -> None:
    """Padding, batches and pieces leave a likelihood as it is."""
    from evals.harness.language_model import NativeLM

    model = load_model(mac_run)
    requests = [(None, [1, 5, 9], [8, 7, 30]), (None, [1], [44]), (None, [1, *range(20, 60)], [3, 4])]
    whole = NativeLM(model, 100, 1, 100)._loglikelihood_tokens(requests, disable_tqdm=True)
    pieces = NativeLM(model, 100, 3, 4)._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, asked), (value, _), (streamed, _) in zip(requests, whole, pieces, strict=True):
        tokens = torch.tensor([[*context, *asked]])
        with torch.no_grad():
            losses = model.network.forward(tokens[:, :-1], tokens[:, 1:])  # type: ignore[attr-defined]
        assert value == pytest.approx(-losses[0, len(context) - 1 :].sum().item(), rel=1e-4)
        assert streamed == pytest.approx(value, rel=1e-4)


def test_an_answer_that_shares_its_token_with_the_text_is_scored_and_nothing_is_never_right(mac_run: Path) -> None:
    from lm_eval.api.instance import Instance

    from evals.harness.language_model import NativeLM

    model = NativeLM(load_model(mac_run), 100, 1, 100)
    processor = model._processor
    word = next(piece for piece in ("number", "special", "learns", "hidden") if len(processor.encode(piece)) == 1)
    text, answer = word[:-1], word[-1]
    assert len(processor.encode(text)) >= len(processor.encode(word)) == 1
    ((value, _),) = model.loglikelihood([Instance("loglikelihood", {}, (text, answer), 0)], disable_tqdm=True)
    ((expected, _),) = model._loglikelihood_tokens([(None, [1], processor.encode(word))], disable_tqdm=True)
    assert value == expected < 0.0
    for asked in ([], list(range(3, 104))):
        with pytest.raises(
            EvaluationError, match=f"asks for the likelihood of {len(asked)} tokens behind 1; it must be"
        ):
            model._loglikelihood_tokens([(None, [1], asked)], disable_tqdm=True)

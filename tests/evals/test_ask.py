"""Asking about a text: from a kept memory as right after reading, and one sentence for each fault."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evals import ask
from evals.command_line import EvaluationError
from evals.models import EvalModel, load_model
from evals.niah import templates
from evals.niah.generate import read
from tests.commands import status_of
from tests.mixers.test_decoding import recorded
from titans_mcore.hf.convert import export
from titans_mcore.mixers import MIXERS

from .conftest import MakeRun

KEPT_MAG = Path(__file__).parents[2] / "evals/results/recall/mag/run"
QUESTION = templates.QUESTION.format(key="gentle-otter")


def write_text(file: Path, lines: int, value: str = "4807215") -> Path:
    text = [templates.NOISE] * lines
    text.insert(lines // 3, templates.NEEDLE.format(key="gentle-otter", value=value))
    file.write_text("\n".join([templates.OPENING, *text]) + "\n", encoding="utf-8")
    return file


def logits_behind(model: EvalModel, memory: ask.TextMemory) -> list[Tensor]:
    texts = (model.tokenizer.processor.encode(text) for text in ("the grass is", "magic 27"))
    return [read(model.stream, [torch.tensor([ids])], lambda _: None, memory.states)[0] for ids in texts]


@pytest.mark.parametrize("exported", [False, True], ids=["run", "export"])
@pytest.mark.parametrize(
    "variant",
    ["mac", "mag", pytest.param("mal", marks=pytest.mark.slow), "lmm", "gated_deltanet", "lmm+transformer"],
)
def test_a_kept_memory_answers_as_right_after_reading_bit_for_bit(
    variant: str, exported: bool, make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run(variant)
    if exported:
        export(folder, tmp_path / "hf", skip_proof=True)
        folder = tmp_path / "hf"
    model = load_model(folder)
    memory = ask.read_text(model, write_text(tmp_path / "text", 9), 100)
    said = [ask.answer_line(model, memory, question, 24) for question in (QUESTION, "The grass", QUESTION)]
    ask.save_memory(memory, model, tmp_path / "memory.safetensors")
    again = load_model(folder)
    loaded = ask.load_memory(tmp_path / "memory.safetensors", again)
    again.decoder.capture = recorded  # by a graph, whose states are its own
    assert (loaded.tokens, loaded.last_token, loaded.source) == (memory.tokens, memory.last_token, memory.source)
    assert all(map(torch.equal, logits_behind(model, loaded), logits_behind(model, memory)))
    assert [ask.answer_line(again, loaded, question, 24) for question in (QUESTION, "The grass", QUESTION)] == said
    assert loaded.digest() == memory.digest(), "asking changed the memory"


def test_a_memory_is_of_one_size_whatever_was_read(mac_run: Path, tmp_path: Path) -> None:
    model, sizes = load_model(mac_run), []
    for lines in (10, 80):
        memory = ask.read_text(model, write_text(tmp_path / "text", lines), 2_048)
        sizes.append((memory.tokens, sum(tensor.numel() for state in memory.states for tensor in state.tensors())))
    assert sizes[1][0] > 4 * sizes[0][0]
    assert sizes[1][1] <= 1.2 * sizes[0][1]  # an open chunk and an open segment may be fuller


def test_a_text_is_read_with_its_question_as_the_tokenizer_reads_both_at_once(tmp_path: Path) -> None:
    model = load_model(KEPT_MAG)
    processor, text = model.tokenizer.processor, write_text(tmp_path / "text", 40).read_text()
    ids = torch.tensor([[processor.bos_id(), *processor.encode(text + QUESTION)]])
    whole, _ = read(model.stream, [ids], lambda _: None)
    for end in ("\n", ""):  # whether the text ends with its line
        (tmp_path / "text").write_text(text.removesuffix("\n") + end)
        memory = ask.read_text(model, tmp_path / "text", 333)
        question = torch.tensor([ask.question_ids(model, memory, QUESTION)])
        behind, _ = read(model.stream, [question], lambda _: None, memory.states)
        torch.testing.assert_close(behind, whole, rtol=0, atol=1e-3)


def test_the_command_finds_a_number_and_finds_it_again_without_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, kept = write_text(tmp_path / "text", 150), tmp_path / "kept" / "memory.safetensors"
    words = ("--checkpoint", KEPT_MAG, "--question", QUESTION, "--max-new-tokens", 16)
    assert status_of(ask.main, *words, "--text", text, "--save-memory", kept) == 0
    out, err = capsys.readouterr()
    assert out == "4807215.\n"
    assert "tokens in" in err
    text.unlink()
    assert status_of(ask.main, *words, "--memory", kept) == 0
    assert capsys.readouterr().out == "4807215.\n"


def test_each_fault_is_one_sentence(
    mac_run: Path,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def says(*words: object, run: Path = mac_run) -> str:
        assert status_of(ask.main, "--checkpoint", run, *words) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line.removeprefix("error: ")

    text, kept, asked = write_text(tmp_path / "text", 5), tmp_path / "kept.safetensors", ("--question", "who is")
    model = load_model(mac_run)
    ask.save_memory(ask.read_text(model, text, 512), model, kept)
    (tmp_path / "empty").touch()

    assert "either --text" in says(*asked)
    assert "either --text" in says(*asked, "--text", text, "--memory", kept)
    assert "nothing is asked" in says("--text", text)
    assert "a --question is empty" in says("--text", text, "--question", " ")
    assert "leave one out" in says(*asked, "--memory", kept, "--save-memory", tmp_path / "other")
    assert "--text /nowhere: no such file" in says(*asked, "--text", "/nowhere")
    assert f"--text {tmp_path}: is a folder" in says(*asked, "--text", tmp_path)
    assert f"--text {tmp_path / 'empty'}: there is no text in it" in says(*asked, "--text", tmp_path / "empty")
    assert f"--save-memory {tmp_path}: is a folder" in says("--text", text, "--save-memory", tmp_path)
    assert f"{text} is a file; give another path" in says("--text", text, "--save-memory", text / "below")
    assert f"--memory {text}: is damaged" in says(*asked, "--memory", text)
    assert "belongs to another checkpoint (mac," in says(*asked, "--memory", kept, run=make_run("mac"))
    assert "transformer has no memory; leave the option out" in says(
        "--text", text, "--save-memory", tmp_path / "other", run=make_run("transformer")
    )
    assert not (tmp_path / "other").exists()


def test_a_damaged_or_foreign_memory_is_refused(mac_run: Path, tmp_path: Path) -> None:
    model, kept, bad = load_model(mac_run), tmp_path / "kept.safetensors", tmp_path / "bad.safetensors"
    ask.save_memory(ask.read_text(model, write_text(tmp_path / "text", 5), 512), model, kept)
    content = kept.read_bytes()

    def refused(data: bytes) -> str:
        bad.write_bytes(data)
        with pytest.raises(EvaluationError) as fault:
            ask.load_memory(bad, model)
        return str(fault.value)

    assert "is damaged" in refused(content[:-1])
    assert "is damaged" in refused(b"")
    assert "its numbers are not those written" in refused(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])

    def with_record(**changes: object) -> bytes:
        record = json.loads(header["__metadata__"]["titans_memory"]) | changes
        words = {**header["__metadata__"], "titans_memory": json.dumps(record)}
        changed = json.dumps({**header, "__metadata__": words}).encode()
        return struct.pack("<Q", len(changed)) + changed + content[8 + size :]

    assert ask.load_memory(kept, model).tokens > 100
    assert "has format 2, and this version reads 1; read the text again" in refused(with_record(format_version=2))
    assert "belongs to another tokenizer" in refused(with_record(tokenizer_sha256="0" * 64))
    shutil.copy(next(mac_run.rglob("*.safetensors")), bad)
    assert "is no memory of a text" in refused(bad.read_bytes())


@pytest.mark.parametrize(("window", "sees"), [(64, "all 2 together the last 127 of the"), (0, "the keys of all")])
def test_a_model_without_memory_says_what_its_window_sees(
    window: int,
    sees: str,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--question", "who is", "--text", write_text(tmp_path / "text", 9))
    assert status_of(ask.main, "--checkpoint", make_run("transformer", window=window), *words) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert sees in notes[0]


def test_only_models_that_keep_nothing_are_said_to_see_a_window(make_run: MakeRun) -> None:
    without = {name for name in MIXERS if ask.what_it_sees(load_model(make_run(name)), 9)}
    assert without == {"transformer"}

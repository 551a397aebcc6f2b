"""DNA: letters, strands, loaders, protocols, scores and the command."""

import gzip
import os
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from evals.command_line import EvaluationError
from evals.genomics import __main__ as genomics
from evals.genomics.data import (
    PAD,
    DnaTask,
    Sequences,
    collate,
    encode,
    load_task,
    nucleotide_tokenizer,
    reverse_complement,
)
from evals.genomics.run import CNN, parts_of, scores
from tests.commands import status_of

REAL = os.environ.get("TITANS_GENOMICS", "")
# Sequences of GUE's files, and their length.
GUE = {
    "mouse/0": (6478, 810, 810, 101),
    "mouse/2": (2620, 328, 328, 101),
    "prom/prom_300_tata": (4904, 613, 613, 300),
    "prom/prom_core_tata": (4904, 613, 613, 70),
    "tf/2": (19_000, 1_000, 1_000, 101),
}
CLASSES = {"negative": ["ACGTACGT", "AAAATTTTCC"], "positive": ["GGGGCCCC", "CCGGN", "acgt"]}


def folders(root: Path) -> Path:
    """As GenomicsBenchmarks is published: split/class/*.txt."""
    for split in ("train", "test"):
        for name, sequences in CLASSES.items():
            (root / split / name).mkdir(parents=True)
            for index, sequence in enumerate(sequences):
                (root / split / name / f"{index}.txt").write_text(sequence)
    return root


def csv_files(root: Path, **changed: str) -> Path:
    """The same as GUE is; `changed` are other contents, by part."""
    root.mkdir(parents=True)
    rows = "".join(f"{sequence},{name}\n" for name, sequences in CLASSES.items() for sequence in sequences)
    for split in ("train", "test"):
        (root / f"{split}.csv").write_text(changed.get(split, f"sequence,label\n{rows}"))
    if "dev" in changed:
        (root / "dev.csv.gz").write_bytes(gzip.compress(changed["dev"].encode()))
    return root


def plain(task: DnaTask) -> dict[str, list[tuple[list[int], int]]]:
    return {part: [(ids.tolist(), label) for ids, label in samples] for part, samples in task.parts.items()}


def test_the_other_strand_is_read_backwards_and_turning_twice_changes_nothing() -> None:
    ids = encode("aacgtnT", "here", 99)
    assert reverse_complement(ids).tolist() == encode("ANACGTT", "here", 99).tolist()
    assert torch.equal(reverse_complement(reverse_complement(ids)), ids)


def test_strands_are_drawn_for_training_alone() -> None:
    samples = [(encode("AACC", "here", 99), 0)]
    assert all(torch.equal(Sequences(samples)[0]["input_ids"], samples[0][0]) for _ in range(20))
    drawn, turned = Sequences(samples, random.Random(0)), 0
    for _ in range(200):
        turned += int(drawn[0]["input_ids"].tolist() == encode("GGTT", "here", 99).tolist())
    assert 70 < turned < 130


def test_a_long_sequence_keeps_its_middle() -> None:
    assert encode("AACGTT", "here", 2).tolist() == encode("CG", "here", 9).tolist()


def test_batches_are_padded_on_the_left() -> None:
    samples = [{"input_ids": encode(x, "here", 9), "labels": index} for index, x in enumerate(("ACG", "T"))]
    batch = collate(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [PAD, PAD, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [0, 1]


def test_the_saved_tokenizer_gives_the_ids_of_training(tmp_path: Path) -> None:
    nucleotide_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(["acGTn", "A C\nR"], padding=True, return_tensors="pt")
    assert batch.input_ids.tolist() == [encode("ACGTN", "here", 9).tolist(), [PAD, PAD, *encode("ACN", "here", 9)]]
    assert set(batch) == {"input_ids", "attention_mask"}
    assert tokenizer.vocab_size == 6


def test_folders_csv_files_and_the_hub_give_the_same_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = load_task(str(folders(tmp_path / "a")), 99), load_task(str(csv_files(tmp_path / "b")), 99)
    assert one.classes == other.classes == ("negative", "positive")
    assert plain(one) == plain(other)
    rows = {
        "seq": [x for xs in CLASSES.values() for x in xs],
        "label": [int(n == "positive") for n, xs in CLASSES.items() for _ in xs],
    }
    hub = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows) for split in ("train", "test")})
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or hub)
    assert plain(load_task("human_nontata_promoters", 99)) == plain(one)
    assert asked == ["katarinagresova/Genomic_Benchmarks_human_nontata_promoters"]


def test_classes_are_numbered_by_name_whatever_the_file_system_lists_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, expected = Path.iterdir, plain(load_task(str(folders(tmp_path)), 99))
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))
    assert plain(load_task(str(tmp_path), 99)) == expected


def test_a_protocol_says_what_chooses(tmp_path: Path) -> None:
    samples = [(encode("ACGT"[index % 4] * (index + 1), "here", 999), index % 2) for index in range(40)]
    task = DnaTask("made", ("a", "b"), {"train": samples, "test": samples[:3]})
    assert parts_of(task, "hyenadna", 0) == (samples, samples[:3])
    learned, chosen = parts_of(task, "caduceus", 0)
    lengths = sorted(len(ids) for ids, _ in learned + chosen)
    assert (len(learned), len(chosen), lengths) == (36, 4, list(range(1, 41)))
    assert [len(ids) for ids, _ in parts_of(task, "caduceus", 0)[1]] == [len(ids) for ids, _ in chosen]
    assert [len(ids) for ids, _ in parts_of(task, "caduceus", 1)[1]] != [len(ids) for ids, _ in chosen]
    with_dev = load_task(str(csv_files(tmp_path / "x", dev="sequence,label\nAC,negative\n")), 99)
    assert len(parts_of(with_dev, "caduceus", 0)[1]) == 1
    assert len(parts_of(with_dev, "caduceus", 0)[0]) == 5


def test_scores_are_the_formulas() -> None:
    class Length(torch.nn.Module):
        """Says the class by the length, even or odd."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": torch.nn.functional.one_hot(attention_mask.sum(1) % 2, 2).float()}

    lengths = [1, 1, 1, 2, 2, 3, 3, 2, 4]
    labels = [1, 1, 1, 0, 0, 0, 0, 1, 0]
    found = scores(
        Length(), [(torch.ones(n, dtype=torch.long), label) for n, label in zip(lengths, labels, strict=True)], 2
    )
    true_positive, true_negative, false_positive, false_negative = 3, 3, 2, 1
    product = (3 + 2) * (3 + 1) * (3 + 2) * (3 + 1)
    mcc = (true_positive * true_negative - false_positive * false_negative) / product**0.5
    assert found == pytest.approx((mcc, 6 / 9))


def test_the_cnn_takes_sequences_of_any_length() -> None:
    model = CNN(3).eval()
    for length in (1, 7, 8, 101):
        assert model(torch.ones(2, length, dtype=torch.long))["logits"].shape == (2, 3)


def test_each_fault_of_the_data_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = iter(range(99))

    def says(**changed: str) -> str:
        with pytest.raises(EvaluationError) as caught:
            load_task(str(csv_files(tmp_path / str(next(count)), **changed)), 99)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    head = "sequence,label\n"
    assert "train.csv, line 3: 'X' is no nucleotide" in says(train=head + "ACGT,negative\nACXT,positive\n")
    assert "test.csv, line 2: the sequence is empty" in says(train=head + "A,a\nC,b\n", test=head + ",a\n")
    assert "all training sequences are of class a" in says(train=head + "A,a\nC,a\n")
    assert "test has class c, which training has not" in says(train=head + "A,a\nC,b\n", test=head + "A,c\n")
    assert "has no test sequences" in says(test=head)
    assert "its first line is not `sequence,label`" in says(train="seq,class\nA,a\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="has no train sequences"):
        load_task(str(tmp_path / "empty"), 99)

    def missing(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(
        EvaluationError, match=r"no such folder, and katarinagresova/.* cannot be read \(no network at all\)"
    ):
        load_task("nowhere", 99)


@pytest.mark.skipif(not REAL, reason="TITANS_GENOMICS names no folder with GUE's files")
@pytest.mark.parametrize("name", GUE)
def test_the_real_files_have_the_known_sequences(name: str) -> None:
    task = load_task(str(Path(REAL) / name), 1024)
    assert tuple(len(task.parts[part]) for part in ("train", "validation", "test")) == GUE[name][:3]
    assert {len(ids) for samples in task.parts.values() for ids, _ in samples} == {GUE[name][3]}


def test_the_command_learns_a_motif_and_labels_the_contaminated_protocol(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    for split, count in (("train", 160), ("test", 40)):
        (tmp_path / "human_nontata_promoters").mkdir(exist_ok=True)
        lines = ["sequence,label"]
        for index in range(count):
            noise = "".join(draw.choice("AT") for _ in range(draw.randint(14, 18)))
            lines.append(f"{noise[:7]}{'CGCG' if index % 2 else 'ATTA'}{noise[7:]},{index % 2}")
        (tmp_path / "human_nontata_promoters" / f"{split}.csv").write_text("\n".join(lines))
    words = ["--data", tmp_path / "human_nontata_promoters", "--seeds", 0, "--systems", "lmm", "cnn", "--steps", 30]
    words += ["--batch", 16, "--dim", 16, "--layers", 1, "--learning-rate", 1e-2]
    assert status_of(genomics.main, *words, "--output", tmp_path / "out", "--export") == 0
    out, err = capsys.readouterr()
    rows = {line.split(" | ")[1]: line.split(" | ") for line in out.splitlines() if "human_nontata" in line}
    assert set(rows) == {"lmm", "cnn"}
    assert float(rows["lmm"][3]) > 0.8, err
    assert "| Titans memory | 75.2 | 89.6 | 89.3 | 96.6 | 79.9 |" in out
    assert "| here, from scratch: lmm | - | - | - | " in out
    exported = next((tmp_path / "out" / "models").iterdir())
    assert {"tokenizer.json", "proof.json", "tasks_titans.py"} <= {file.name for file in exported.iterdir()}
    contaminated = ["--protocol", "hyenadna", "--output", tmp_path / "other", "--systems", "cnn"]
    assert status_of(genomics.main, *words, *contaminated) == 0
    assert "| cnn, chosen by TEST data (contaminated) |" in capsys.readouterr().out
    assert status_of(genomics.main, *words, "--output", tmp_path / "other") == 2
    assert "has results with --protocol hyenadna, not caduceus" in capsys.readouterr().err
    assert status_of(genomics.main, *words, "--output", tmp_path / "new", "--systems", "lstm") == 2
    assert "--systems lstm: variant is 'lstm'" in capsys.readouterr().err

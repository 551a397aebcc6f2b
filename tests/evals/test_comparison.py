"""The comparison: systems of one size, one budget, parts that are done once, means with intervals."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from evals.command_line import EvaluationError
from evals.comparison import SystemsComparisonSettings
from evals.comparison.run import ABLATIONS, RECALL_MODEL, choose, compare
from evals.comparison.summary import Result, markdown, write_report
from evals.paper import published
from evals.paper.tables import ablated
from evals.record_file import RecordFile
from evals.report import mean_interval
from pretrain.config.files import build, read_config, systems
from pretrain.plan.parameters import count_by_part, parameters_of
from titans_mcore.io import try_lock
from titans_mcore.mixers import MIXERS

from ..pretrain.conftest import TINY
from ..pretrain.tiny_shards import write_shards
from .conftest import train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def budget(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny configuration, and shards for it."""
    folder = tmp_path_factory.mktemp("budget")
    toml = folder / "tiny.toml"
    toml.write_text(
        TINY.replace("ffn_dim = 64", "ffn_dim = 128").replace("[data]\n", "") + "[parallel]\nzero_stage = 0\n"
    )
    return toml, write_shards(folder / "shards", vocab_size=360, documents=60, tokenizer=train_tokenizer(360))


def settings(budget: tuple[Path, Path], output: Path, *names: str, **more: object) -> SystemsComparisonSettings:
    toml, shards = budget
    fixed = {"parts": ("text",), "seeds": (0,), "config": str(toml)}
    return SystemsComparisonSettings(output, shards, names, **{**fixed, **more})  # type: ignore[arg-type]


def text(system: str, seed: int, loss: float) -> Result:
    measures = {
        "parameters": 1000,
        "ffn_dim": 8,
        "loss": loss,
        "within": loss,
        "beyond": None,
        "tokens_per_second": 5.0,
    }
    buckets = [{"last": last, "loss": loss + 1 / last} for last in (16, 32, 64)]
    return Result(system, seed, "text", {**measures, "buckets": buckets, "state_bytes": {"512": 2_048}})


def test_every_system_has_the_parameters_of_transformer_within_3_percent() -> None:
    shared = build(*read_config("comparison")).model
    chosen = {system.name: system for system in choose((), shared)}
    assert chosen.keys() == systems().keys() >= {*MIXERS, "samba", "gated_deltanet_h1", "gated_deltanet_h2"}
    assert chosen["transformer"].model["ffn_dim"] == shared.ffn_dim, "the reference is not as configured"
    for system in chosen.values():
        config = replace(shared, **system.model)
        counted = count_by_part(parameters_of(config))
        assert counted["total"] - counted["embedding"] == system.parameters, system.name
        assert system.parameters == pytest.approx(chosen["transformer"].parameters, rel=0.03), system.name
        assert (config.num_layers, config.dim) == (shared.num_layers, shared.dim)


def test_recall_is_compared_at_one_size_with_a_block_of_each_mixer() -> None:
    shared = replace(build(*read_config("recall")).model, **RECALL_MODEL)
    chosen = {system.name: system for system in choose((), shared)}
    assert chosen.keys() == systems().keys()
    for system in chosen.values():
        assert system.parameters == pytest.approx(chosen["transformer"].parameters, rel=0.03), system.name
    blocks = {name: system.model["num_layers"] for name, system in chosen.items()}
    assert blocks.pop("gated_deltanet_h2") == 3
    assert set(blocks.values()) == {2}


def test_the_ablations_are_those_of_the_papers_table_and_differ_in_nothing_else() -> None:
    shared = build(*read_config("comparison")).model
    lmm, *others = choose(("lmm", *ABLATIONS), shared)
    rows = [ablated(asdict(replace(shared, **system.model))) for system in (lmm, *others)]
    assert {row for row in rows if row} == published.ABLATION.keys()
    for system in others:
        differs = {name for name, value in system.model.items() if name not in lmm.model}
        assert differs == ABLATIONS[system.name].keys()
        assert system.parameters == pytest.approx(lmm.parameters, rel=0.03)


def test_a_system_too_large_for_transformers_parameters_is_refused() -> None:
    shared = replace(build(*read_config("comparison")).model, ffn_dim=64)
    with pytest.raises(EvaluationError, match=r"mac has .* raise model.ffn_dim of --config, which is 64"):
        choose(("mac",), shared)


def test_a_system_that_the_shared_settings_do_not_suit_is_named_with_the_reason() -> None:
    shared = replace(build(*read_config("comparison")).model, variant="transformer", conv_kernel=1)
    with pytest.raises(
        EvaluationError, match=r"--config does not suit lmm: memory_init .* conv_kernel is 1; make it 2"
    ):
        choose(("mamba", "lmm"), replace(shared, memory_init="next_token"))


def test_intervals_are_students() -> None:
    assert mean_interval([3.5]) == (3.5, None)
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / 3**0.5, rel=1e-3))
    assert mean_interval([1.0, 2.0]) == (1.5, pytest.approx(12.706 * 0.5, rel=1e-3))
    many = [float(n % 2) for n in range(40)]
    assert mean_interval(many)[1] == pytest.approx(2.228 * statistics.stdev(many) / 40**0.5, rel=1e-3)


def test_the_table_has_a_line_for_each_system_and_means_over_its_seeds(tmp_path: Path) -> None:
    needles = [
        Result(
            "b",
            seed,
            "needles",
            {"accuracy": {"niah_single_1": found}, "samples": 10, "parameters": 1000, "ffn_dim": 8},
        )
        for seed, found in enumerate(({"320": 1.0, "1280": 0.5}, {"320": 1.0, "1280": 0.0}))
    ]
    results = [text("a", 0, 1.0), text("a", 1, 2.0), text("b", 0, 4.0), *needles]
    lines = markdown(results).splitlines()
    heads = "| system | parameters | ffn_dim | seeds | held-out | streamed | tokens/s | state at 512 | "
    assert lines[0] == heads + "S-NIAH-PK 320 | S-NIAH-PK 1,280 |"
    assert lines[2] == "| a | 1,000 | 8 | 2 | 1.500 ± 6.353 | 1.500 ± 6.353 | 5 ± 0 | 2.0 kB |  |  |"
    found = "1.00 (0.84 to 1.00) | 0.25 (0.11 to 0.47)"  # Wilson's, of 20 and of 5 of 20
    assert lines[3] == f"| b | 1,000 | 8 | 2 | 4.000 | 4.000 | 5 | 2.0 kB | {found} |"
    write_report(tmp_path, results)
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert [Result(**result) for result in written["results"]] == results
    assert written["means"]["a"]["held-out"] == {"mean": 1.5, "interval": pytest.approx([1.5 - 6.353, 1.5 + 6.353])}
    assert written["means"]["b"]["held-out"] == {"mean": 4.0, "interval": None}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "comparison.md").read_text() == markdown(results) + "\n"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"seeds": (0, 1, 0)}, "--seeds 0 1 0 is empty or names one twice; name each once"),
        ({"systems": ("mac", "mac")}, "--systems mac mac is empty or names one twice"),
        ({"seeds": (-1,)}, r"--seeds is \(-1,\); give at least 0"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"parts": ()}, "--parts is empty"),
        ({"data": None}, "--data is missing; the part text reads a folder of shards"),
        ({"steps": 0}, "--steps is 0; give at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(more: dict[str, object], sentence: str) -> None:
    with pytest.raises(EvaluationError, match=sentence):
        SystemsComparisonSettings(Path("unused"), **{"data": Path("unused"), **more})  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_anything_is_trained(budget: tuple[Path, Path], tmp_path: Path) -> None:
    def refused(sentence: str, *names: str, output: Path = tmp_path / "out", **more: object) -> None:
        with pytest.raises(EvaluationError, match=sentence):
            compare(settings((budget[0], more.pop("data", budget[1])), output, *names, **more))  # type: ignore[arg-type]

    refused(r"--systems names gpt, rnn; choose among: deltanet, .*samba", "gpt", "rnn")
    refused(r"nowhere.*manifest.json", data=tmp_path / "nowhere")
    refused("--config bogus is neither a file nor a preset", config="bogus")
    refused(
        "lmm_depth_3 has .*; raise model.ffn_dim of the preset recall, .*; or ask for --parts text alone$",
        "lmm_depth_3",
        parts=("text", "lists"),
    )
    (tmp_path / "file").touch()
    refused("cannot write comparison.jsonl there", "transformer", output=tmp_path / "file")
    with RecordFile(tmp_path / "out" / "comparison.jsonl", Result):
        refused("another evaluation is writing it; wait for it", "lmm_no_convolution")  # it suits --parts text
    (tmp_path / "out" / "budget.json").write_text('{"train.steps": 20}')
    refused("was begun with train.steps 20, now it is 5: results would not compare", "transformer", steps=5)
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.slow
def test_two_systems_are_trained_once_and_a_failed_part_leaves_the_others(
    budget: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = settings(budget, tmp_path / "out", "transformer", "mal")
    blocked = tmp_path / "out" / "runs" / "text" / "mal-0"
    blocked.parent.mkdir(parents=True)
    blocked.touch()  # no folder can be made there
    with pytest.raises(EvaluationError, match=r"^text of mal with seed 0 failed; .* the same command tries again$"):
        compare(asked)
    blocked.unlink()
    capfd.readouterr()
    table = compare(asked)
    again = capfd.readouterr().err
    assert "2 of 2: text of mal with seed 0" in again
    assert "1 of 2" not in again, "what was finished was done again"
    found = {r["system"]: r["measures"] for r in json.loads((tmp_path / "out/comparison.json").read_text())["results"]}
    for system in ("transformer", "mal"):
        records = (tmp_path / "out/runs/text" / f"{system}-0" / "metrics.jsonl").read_text().splitlines()
        (heldout,) = [record["loss"] for record in map(json.loads, records) if record["kind"] == "heldout"]
        assert found[system]["loss"] == heldout
        assert f"{heldout:.3f}" in table
        assert [bucket["last"] for bucket in found[system]["buckets"]] == [1, 2, 4, 8, 16, 32, 64, 128]
    sizes = {system: measures["state_bytes"] for system, measures in found.items()}
    assert sizes["mal"]["32"] == sizes["mal"]["512"], "a memory's state has grown"
    assert sizes["transformer"]["512"] > 8 * sizes["transformer"]["32"], "full attention kept too few keys"


@pytest.mark.slow
def test_needles_are_looked_for_in_a_model_of_the_lists_size(tmp_path: Path) -> None:
    asked = SystemsComparisonSettings(
        tmp_path, systems=("gated_deltanet",), seeds=(0,), parts=("needles",), recall_steps=2, samples=1
    )
    table = compare(asked)
    found = {r["part"]: r["measures"] for r in json.loads((tmp_path / "comparison.json").read_text())["results"]}
    assert found.keys() == {"lists", "needles"}
    lengths = ["320", "1280", "5120", "20480"]
    assert {tuple(own) for own in found["needles"]["accuracy"].values()} == {tuple(lengths)}
    assert all(
        round(5 * share, 6).is_integer() for own in found["needles"]["accuracy"].values() for share in own.values()
    )
    assert "S-NIAH-PK 320 | S-NIAH-PK 1,280" in table
    assert "S-NIAH-W 20,480" in table
    config = json.loads((tmp_path / "runs/needles/gated_deltanet-0/config.json").read_text())
    assert (config["num_layers"], config["conv_kernel"]) == (2, 20)
    assert config["ffn_dim"] == found["lists"]["ffn_dim"]


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_killed_and_started_again_gives_what_an_uninterrupted_comparison_gives(
    budget: tuple[Path, Path], tmp_path: Path
) -> None:
    toml, shards = budget
    words = [sys.executable, "-m", "evals.comparison", "--config", str(toml), "--data", str(shards), "--steps", "120"]
    words += ["--systems", "lmm", "--seeds", "3", "--parts", "text", "--output"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*words, str(killed)], cwd=ROOT, stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while not list(killed.glob("runs/text/lmm-3/checkpoints/step-*/checkpoint.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with (killed / "comparison.jsonl").open() as held:
            while not try_lock(held.fileno()):  # the training saves and ends
                assert time.monotonic() < deadline
                time.sleep(0.1)
        for output in (killed, whole):
            subprocess.run([*words, str(output)], cwd=ROOT, stdout=log, stderr=log, check=True)
    records = [json.loads(line) for line in (killed / "runs/text/lmm-3/metrics.jsonl").read_text().splitlines()]
    resumed = [record["resumed_step"] for record in records if record["kind"] == "attempt"]
    assert len(resumed) == 2
    assert 0 < resumed[1] < 120, "it was not killed in the middle"
    losses = [
        json.loads((o / "comparison.json").read_text())["results"][0]["measures"]["loss"] for o in (killed, whole)
    ]
    assert losses[0] == losses[1]

"""The comparison: which parts are missing, each as commands of its own, and the table behind every one."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError
from evals.comparison.settings import ComparisonSettings
from evals.comparison.summary import Result, write_report
from evals.comparison.systems import System, choose
from evals.record_file import RecordFile
from evals.report import write_json
from pretrain.config.files import build, read_config
from pretrain.config.run_config import RunConfig
from pretrain.launch.status import STATUS_DIR
from pretrain.report.history import History
from pretrain.report.records import read_records
from tokenization.command_line import TokenizationError
from tokenization.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "evals" / "results" / "recall" / "tokenizer.model"
"""Of lists and needles: few pieces, so that small models need not learn many words first."""
_RECALL = {
    "train.global_batch": 8,
    "train.micro_batch": 8,
    "data.reset_documents": "false",  # every row is one document
    "evaluate.heldout_sequences": 48,
}
_SHORT = {"model.window": 32, "model.segment_length": 32}  # a list is longer: it cannot be copied out of a window
_NEEDLES = ("--repeats", 6, "--questions", 3, "--other-words", 0.5)
_LIST_TOKENS, _NEEDLE_TOKENS = 256, 320  # of a document; a uuid is found in 320 at the least
_TIMES = (1, 4, 16, 64)  # the trained length, in haystacks
_LONG_TOKENS = 32_768  # of held-out text, streamed
_ANSWER = 48  # tokens; a uuid has 39
_WARM_UP_STEPS = 20


@dataclass(frozen=True)
class Place:
    """What every part of a comparison needs."""

    settings: ComparisonSettings
    """What was asked for."""
    config: RunConfig
    """What all systems share."""
    heldout_tokens: int
    """Of the shards."""
    lock: int
    """Descriptor that children hold too."""

    @property
    def output(self) -> Path:
        """Folder, from wherever a child looks."""
        return self.settings.output.resolve()

    def run_of(self, part: str, system: System, seed: int) -> Path:
        """Run folder."""
        return self.output / "runs" / part / f"{system.name}-{seed}"


def compare(settings: ComparisonSettings) -> str:
    """Trains and measures what is missing, and returns the table.

    Raises:
        EvaluationError: Something that was asked for does not fit, another process is at it, or parts failed.
    """
    try:
        config = build(*read_config(settings.config))
        shards = None if settings.data is None else Manifest.load(settings.data)
    except (ValueError, TokenizationError) as fault:
        raise EvaluationError(str(fault)) from None
    if settings.steps is not None:
        config = replace(config, train=replace(config.train, steps=settings.steps))
    systems = choose(settings.systems, config.model)
    with RecordFile(settings.output / "comparison.jsonl", Result) as results:
        _hold_to_budget(settings, config, shards)
        for system in systems:
            width = system.model["ffn_dim"]
            say(f"{system.name}: {system.parameters:,} parameters beside the embedding, ffn_dim {width}")
        heldout = 0 if shards is None else shards.splits["heldout"].tokens
        failed = _run_missing(Place(settings, config, heldout, results.fileno()), systems, results)
        table = write_report(settings.output, results.records)
    if failed:
        print(table)
        raise EvaluationError(f"{'; '.join(failed)}; the lines above say why, the same command tries again")
    return table


def _run_missing(place: Place, systems: list[System], results: RecordFile[Result]) -> list[str]:
    """Runs the parts that have no result, one seed of all systems after the other, and returns what failed."""
    settings, failed = place.settings, list[str]()
    order = [part for part in PARTS if part in settings.parts or (part == "lists" and "needles" in settings.parts)]
    wanted = [(system, seed, part) for seed in settings.seeds for part in order for system in systems]
    done = {(result.system, result.seed, result.part) for result in results.records}
    for number, (system, seed, part) in enumerate(wanted, 1):
        if (system.name, seed, part) in done:
            continue
        name = f"{part} of {system.name}, seed {seed}"
        say(f"{number} of {len(wanted)}: {name}")
        try:
            measures = PARTS[part](place, system, seed)
        except EvaluationError as fault:
            say(f"error: {fault}")
            failed.append(f"{name} failed")
            continue
        sizes = {"parameters": system.parameters, "ffn_dim": system.model["ffn_dim"]}
        results.append([Result(system.name, seed, part, sizes | measures)])
        write_report(settings.output, results.records)
    return failed


def _text(place: Place, system: System, seed: int) -> dict[str, Any]:
    """Held-out loss, by position to four times the trained length; what the state takes."""
    run, data, length = place.run_of("text", system, seed), place.settings.data, place.config.train.sequence_length
    assert data is not None
    trained = _train(place, run, system, seed, data, place.config.train.steps, {})
    long = min(4 * length, place.heldout_tokens - 1)
    child(
        *("evals.position_perplexity", "--checkpoint", run, "--data", data.resolve(), "--output", run / "eval"),
        *("--length", long, "--tokens", _LONG_TOKENS),
        lock=place.lock,
    )
    child(
        *("evals.efficiency", "context", "--checkpoint", run, "--json", run / "eval" / "context.json"),
        *("--lengths", length, 16 * length, "--decode-tokens", 16),
        lock=place.lock,
    )
    position, context = (_read(run / "eval" / f"{name}.json") for name in ("position_perplexity", "context"))
    return trained | {
        "buckets": position["buckets"],
        "within": position["within_trained_length"]["loss"],
        "beyond": position.get("beyond_trained_length", {}).get("loss"),
        "state_bytes": {str(row["length"]): row.get("state_bytes") for row in context["rows"]},
    }


def _lists(place: Place, system: System, seed: int) -> dict[str, Any]:
    """Held-out loss on lists that are said again and again."""
    run = place.run_of("lists", system, seed)
    data = recall_shards(place.output, "lists", _LIST_TOKENS, "--lists", lock=place.lock)
    return _train(place, run, system, seed, data, place.settings.recall_steps, _RECALL | _rows(_LIST_TOKENS))


def _needles(place: Place, system: System, seed: int) -> dict[str, Any]:
    """S-NIAH of a model that learns from lists first, from documents with needles then."""
    run, settings = place.run_of("needles", system, seed), place.settings
    more = _RECALL | _rows(_NEEDLE_TOKENS) | {"train.weights_from": place.run_of("lists", system, seed)}
    data = recall_shards(place.output, "needles", _NEEDLE_TOKENS, *_NEEDLES, lock=place.lock)
    trained = _train(place, run, system, seed, data, settings.recall_steps, more)
    child(
        *("evals.niah", "--checkpoint", run, "--output", run / "eval", "--tasks", "pk", "n", "w"),
        *("--lengths", *(_NEEDLE_TOKENS * times for times in _TIMES), "--depths", 5, "--samples", settings.samples),
        *("--max-new-tokens", _ANSWER),
        lock=place.lock,
    )
    return trained | {"accuracy": _read(run / "eval" / "niah.json")["accuracy_by_length"]}


PARTS: dict[str, Callable[[Place, System, int], dict[str, Any]]] = {
    "text": _text,
    "lists": _lists,
    "needles": _needles,
}


def _train(
    place: Place, run: Path, system: System, seed: int, data: Path, steps: int, more: dict[str, Any]
) -> dict[str, Any]:
    """Trains a system, from its checkpoint where there is one, and returns what the run says of itself."""
    short = _SHORT if more else {}
    own = {f"model.{name}": value for name, value in system.model.items()}
    settings = {**short, **own, "train.seed": seed, "train.steps": steps, **more}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    config = place.settings.config
    named = ["--config", Path(config).resolve() if Path(config).exists() else config, "--run-dir", run]
    child("pretrain.train", *named, "--data.path", data.resolve(), *flags, lock=place.lock, status=run)
    found = outcome(run, steps)
    if found is None:
        raise EvaluationError(f"{run} was stopped before step {steps}")
    return found


def outcome(run: Path, steps: int) -> dict[str, Any] | None:
    """Held-out loss of a run, largest gradient norm after 20 steps, and speed; None unless all steps are done."""
    history = History(read_records(run))
    heldout = history.series("loss", "heldout").values
    if not heldout or history.last_step is None or history.last_step["step"] < steps:
        return None
    norms, speeds = (history.series(name).values for name in ("grad_norm", "tokens_per_second"))
    return {
        "loss": heldout[-1],
        "largest_norm": max(norms[_WARM_UP_STEPS:] or norms),
        "tokens_per_second": statistics.median(speeds[1:] or speeds),
    }


def _rows(tokens: int) -> dict[str, Any]:
    return {"train.sequence_length": tokens}


def recall_shards(output: Path, name: str, tokens: int, *more: Any, lock: int | None = None) -> Path:
    """Shards of documents to recall from, made where they are missing.

    Args:
        output: Folder that holds them under their name.
        name: What they are called.
        tokens: Of a document.
        more: Flags of evals.niah.training_data.
        lock: As `child` takes it.
    """
    shards, text = output / name, output / f"{name}.jsonl"
    if not (shards / "manifest.json").is_file():
        size, tokenizer = ["--tokens", tokens, "--documents", 4_500], ["--tokenizer", TOKENIZER]
        child("evals.niah.training_data", "--output", text, *size, *tokenizer, *more, lock=lock)
        child("tokenization.encode", "--input", text, *tokenizer, "--output", shards, "--workers", 1, lock=lock)
    return shards


def child(module: str, *words: Any, lock: int | None = None, status: Path | None = None) -> None:
    """Runs a command of the project; what it prints goes to stderr.

    Args:
        module: Of the command.
        words: Behind it.
        lock: Descriptor that it shall hold: what is left of a killed comparison keeps another one out.
        status: Run folder of a training, which is to save and end when this process is killed.

    Raises:
        EvaluationError: It ended with another status than 0.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    say(f"$ {' '.join(command)}")
    environment = os.environ | ({STATUS_DIR: str(status)} if status else {})
    held = () if lock is None else (lock,)
    if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, pass_fds=held).returncode:
        raise EvaluationError(f"{' '.join(command)} failed; its lines above say why")


def _hold_to_budget(settings: ComparisonSettings, config: RunConfig, shards: Manifest | None) -> None:
    """Writes OUTPUT/budget.json, or refuses another budget than the one there."""
    tree = asdict(config)
    del tree["data"]
    budget = {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}
    budget |= {"recall_steps": settings.recall_steps, "samples": settings.samples}
    if shards is not None:
        budget["data"] = shards.fingerprint
    file = settings.output / "budget.json"
    before = _read(file) if file.is_file() else {}
    for name, value in json.loads(json.dumps(budget)).items():
        if before.get(name, value) != value:
            raise EvaluationError(
                f"--output {settings.output} was begun with {name} {before[name]}, now it is {value}: results would "
                "not compare; ask for the same, or give another --output"
            )
    write_json(file, before | budget)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def say(sentence: str) -> None:
    """Prints a line beside the table."""
    print(sentence, file=sys.stderr, flush=True)

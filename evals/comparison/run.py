"""The comparison: which parts are missing, each as commands of its own, and the table behind every one.

Every system is as large as Transformer++: the width of its feed-forward network makes up for its mixer.
"""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from evals.command_line import EvaluationError, run_module, say
from evals.comparison import SystemsComparisonSettings
from evals.comparison.summary import Result, write_report
from evals.niah.haystacks import sentences
from evals.record_file import RecordFile
from evals.report import read_json, write_bytes, write_json
from pretrain.config.files import build, read_config, systems
from pretrain.config.run_config import RunConfig
from pretrain.launch.status import LAUNCHER, STATUS_DIR
from pretrain.plan.parameters import count_by_part, parameters_of
from pretrain.report.history import History
from pretrain.report.records import read_records
from titans_mcore.config import TitansConfig
from tokenization.command_line import TokenizationError
from tokenization.manifest import HELDOUT, Manifest

_ROOT = Path(__file__).resolve().parents[2]
_TOKENIZER = _ROOT / "evals" / "results" / "recall" / "tokenizer.model"  # few pieces: few words to learn first
_RECALL = "recall"
RECALL_MODEL: dict[str, Any] = {
    "ffn_dim": 512,  # Transformer++'s, which leaves room for three mixers that take turns
    "num_layers": 2,  # attention alone takes two blocks to find what followed a word
    "conv_kernel": 20,  # a key is in sight of every digit of its value
}
"""Where the parts lists and needles differ from the preset recall."""
_LIST_TOKENS, _NEEDLE_TOKENS = 256, 320  # of a document; less than 320 cannot hold a haystack with a uuid
_NEEDLES = ("--repeats", 2, "--questions", 3, "--other-words", 0.25, "--tasks", "pk", "n", "w")
_TUNE = ("--batch", 8, "--write-cost", 5, "--text-weight", 0.02)  # as launch/recall.sh does it in prose
_DOCUMENTS = 4_900
_PROSE_SENTENCES = 20_000
_DEPTHS = 5  # of a needle, each with so many samples as asked for
_ANSWER = ("--max-new-tokens", 48)  # a uuid has 39
_LONG_TOKENS = 32_768  # of held-out text, streamed
_WARM_UP_STEPS = 20


ABLATIONS: dict[str, dict[str, Any]] = {
    "lmm_linear": {"memory_depth": 1},
    "lmm_depth_3": {"memory_depth": 3},
    "lmm_depth_4": {"memory_depth": 4},
    "lmm_no_convolution": {"conv_kernel": 1, "memory_init": "random"},  # what next_token finds, it finds by it
    "lmm_no_momentum": {"memory_momentum": False},
    "lmm_no_forgetting": {"memory_forgetting": False},
    "lmm_forgetting": {"memory_forgetting": True},
    "lmm_no_persistent_tokens": {"persistent_tokens": 0},
}
"""The paper's Table 5, and its Figure 7 on depths: what differs from LMM."""
_REFERENCE = "transformer"
_TOLERANCE = 0.03
_WIDTH_STEP = 8  # the least that GPUs multiply well


@dataclass(frozen=True)
class System:
    """One line of the comparison."""

    name: str
    """As in the presets."""
    model: dict[str, Any]
    """Settings that it does not share with the others, ffn_dim among them, and blocks: one of each mixer at least."""
    parameters: int
    """Beside the embedding, which is everyone's."""


def choose(names: Sequence[str], shared: TitansConfig, source: str = "--config") -> list[System]:
    """Systems of one size.

    Args:
        names: Which; none means all.
        shared: What they have in common; its ffn_dim is Transformer++'s.
        source: Where that comes from, for messages.

    Raises:
        EvaluationError: A name is unknown, or a system cannot have Transformer++'s parameters.
    """
    paper = systems()
    known = paper | {name: paper["lmm"] | model for name, model in ABLATIONS.items()}
    if unknown := sorted(set(names) - set(known)):
        raise EvaluationError(f"--systems names {', '.join(unknown)}; choose among: {', '.join(known)}")
    target = sum(_count(replace(shared, **known[_REFERENCE])))
    return [_matched(name, known[name], shared, target, source) for name in names or paper]


def _choose_for_recall(names: Sequence[str]) -> list[System]:
    """Those of the parts lists and needles."""
    try:
        return choose(names, replace(build(*read_config(_RECALL)).model, **RECALL_MODEL), f"the preset {_RECALL}")
    except EvaluationError as fault:
        raise EvaluationError(f"{fault}; or ask for --parts text alone") from None


def _matched(name: str, model: dict[str, Any], shared: TitansConfig, target: int, source: str) -> System:
    model = model | {"num_layers": max(shared.num_layers, model["variant"].count("+") + 1)}
    try:
        feed_forward, rest = _count(replace(shared, **model))
    except ValueError as error:
        raise EvaluationError(f"{source} does not suit {name}: {error}") from None
    each = feed_forward // shared.ffn_dim  # three matrices in every block, without biases
    width = max(round((target - rest) / each / _WIDTH_STEP), 1) * _WIDTH_STEP
    total = rest + each * width
    if abs(total / target - 1) > _TOLERANCE:
        raise EvaluationError(
            f"{name} has {total:,} parameters with a feed-forward network of {width}, Transformer++ {target:,}; "
            f"raise model.ffn_dim of {source}, which is {shared.ffn_dim}"
        )
    return System(name, {**model, "ffn_dim": width}, total)


def _count(config: TitansConfig) -> tuple[int, int]:
    """Parameters of the feed-forward networks, and of all else beside the embedding."""
    counted = count_by_part(parameters_of(config))
    return counted["feed_forward"], counted["total"] - counted["feed_forward"] - counted["embedding"]


def compare(settings: SystemsComparisonSettings) -> str:
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
    systems = {}
    if "text" in settings.parts:
        systems["text"] = choose(settings.systems, config.model)
    if {"lists", "needles"} & set(settings.parts):
        systems["lists"] = _choose_for_recall(settings.systems)
    if "needles" in settings.parts:
        systems["needles"] = systems["lists"]
    with RecordFile(settings.output / "comparison.jsonl", Result) as results:
        _hold_to_budget(settings, config, shards)
        for part, chosen in systems.items():
            for system in chosen:
                width = system.model["ffn_dim"]
                say(f"{part}, {system.name}: {system.parameters:,} parameters beside the embedding, ffn_dim {width}")
        failed = _run_missing(_Parts(settings, config, shards, results.fileno()), systems, results)
        table = write_report(settings.output, results.records)
    if failed:
        print(table)
        raise EvaluationError(f"{', '.join(failed)} failed; the lines above say why, the same command tries again")
    return table


def _run_missing(parts: "_Parts", systems: dict[str, list[System]], results: RecordFile[Result]) -> list[str]:
    """Runs the parts that have no result, one seed of all systems after the other, and returns what failed."""
    settings, failed = parts.settings, list[str]()
    every = {"text": parts.text, "lists": parts.lists, "needles": parts.needles}
    wanted = [(seed, part, system) for seed in settings.seeds for part in systems for system in systems[part]]
    done = {(result.seed, result.part, result.system) for result in results.records}
    for number, (seed, part, system) in enumerate(wanted, 1):
        if (seed, part, system.name) in done:
            continue
        name = f"{part} of {system.name} with seed {seed}"
        say(f"{number} of {len(wanted)}: {name}")
        try:
            measures = every[part](system, seed)
        except EvaluationError as fault:
            say(f"error: {fault}")
            failed.append(name)
            continue
        sizes = {"parameters": system.parameters, "ffn_dim": system.model["ffn_dim"]}
        results.append([Result(system.name, seed, part, sizes | measures)])
        write_report(settings.output, results.records)
    return failed


@dataclass(frozen=True)
class _Parts:
    """What is trained and measured of a system, by a seed."""

    settings: SystemsComparisonSettings
    config: RunConfig
    shards: Manifest | None
    lock: int

    def text(self, system: System, seed: int) -> dict[str, Any]:
        """Held-out loss, by position to four times the trained length; what the state takes."""
        assert self.shards is not None
        assert self.settings.data is not None
        data, length = self.settings.data.resolve(), self.config.train.sequence_length
        run, trained = self._train("text", self.settings.config, system, seed, data, self.config.train.steps)
        long = min(4 * length, self.shards.splits[HELDOUT].tokens - 1)
        of, to = ("--checkpoint", run), run / "eval"
        rows = ("--data", data, "--length", long, "--tokens", _LONG_TOKENS)
        child("evals.position_perplexity", *of, *rows, "--output", to, lock=self.lock)
        lengths = ("--lengths", length, 16 * length, "--decode-tokens", 16)
        child("evals.efficiency", "context", *of, *lengths, "--json", to / "context.json", lock=self.lock)
        position, context = read_json(to / "position_perplexity.json"), read_json(to / "context.json")
        return trained | {
            "buckets": position["buckets"],
            "within": position["within_trained_length"]["loss"],
            "beyond": position.get("beyond_trained_length", {}).get("loss"),
            "state_bytes": {str(row["length"]): row.get("state_bytes") for row in context["rows"]},
        }

    def lists(self, system: System, seed: int) -> dict[str, Any]:
        """Held-out loss on lists that are said again and again."""
        shards, text = self._output / "lists", self._documents("lists", _LIST_TOKENS, "--lists")
        if not (shards / "manifest.json").is_file():
            words = ("--input", text, "--tokenizer", _TOKENIZER, "--output", shards, "--workers", 1)
            child("tokenization.encode", *words, lock=self.lock)
        system = replace(system, model=RECALL_MODEL | system.model)
        return self._train("lists", _RECALL, system, seed, shards, self.settings.recall_steps)[1]

    def needles(self, system: System, seed: int) -> dict[str, Any]:
        """S-NIAH of a model that learned from lists first, then from the answers of documents with needles."""
        prose = self._output / "prose.txt"
        if not prose.is_file():
            text = " ".join(islice(sentences("to learn from"), _PROSE_SENTENCES))
            write_bytes(prose, text.encode())
        documents = self._documents("needles", _NEEDLE_TOKENS, *_NEEDLES, "--text", prose)
        tuned = self._run_dir("needles", system, seed)
        if not (tuned / "config.json").is_file():
            words = ("--checkpoint", self._run_dir("lists", system, seed), "--documents", documents, "--output", tuned)
            steps = ("--steps", 2 * self.settings.recall_steps, "--seed", seed)
            child("evals.finetune", *words, *steps, *_TUNE, lock=self.lock)
        lengths = [_NEEDLE_TOKENS * times for times in (1, 4, 16, 64)]
        grid = ("--lengths", *lengths, "--depths", _DEPTHS, "--samples", self.settings.samples)
        found = tuned.with_name(f"{tuned.name}-eval")
        of, tasks = ("--checkpoint", tuned, "--output", found), ("--tasks", "pk", "n", "w")
        child("evals.niah", *of, *tasks, *grid, *_ANSWER, lock=self.lock)
        accuracy = read_json(found / "niah.json")["accuracy_by_length"]
        return {"accuracy": accuracy, "samples": _DEPTHS * self.settings.samples}

    def _documents(self, name: str, tokens: int, *more: Any) -> Path:
        """Documents to recall from, made where they are missing; `more` are flags of evals.niah.training_data."""
        file = self._output / f"{name}.jsonl"
        if not file.is_file():
            size = ("--tokens", tokens, "--documents", _DOCUMENTS, "--tokenizer", _TOKENIZER)
            child("evals.niah.training_data", "--output", file, *size, *more, lock=self.lock)
        return file

    @property
    def _output(self) -> Path:
        return self.settings.output.resolve()

    def _run_dir(self, part: str, system: System, seed: int) -> Path:
        return self._output / "runs" / part / f"{system.name}-{seed}"

    def _train(
        self, part: str, config: str, system: System, seed: int, data: Path, steps: int
    ) -> tuple[Path, dict[str, Any]]:
        """Trains a system, from its checkpoint where there is one; its run folder and what it came to."""
        run = self._run_dir(part, system, seed)
        own = {f"model.{name}": value for name, value in system.model.items()}
        settings = {**own, "train.seed": seed, "train.steps": steps, "parallel.tensor": 1}  # one process
        flags = list[str]()
        for name, value in settings.items():
            flags += [f"--{name.replace('_', '-')}", str(value).lower() if isinstance(value, bool) else str(value)]
        named = ["--config", Path(config).resolve() if Path(config).exists() else config, "--run-dir", run]
        child("pretrain.train", *named, "--data.path", data, *flags, lock=self.lock, run=run)
        return run, outcome(run, steps)


def outcome(run: Path, steps: int) -> dict[str, Any]:
    """What a run came to: held-out loss, largest gradient norm after 20 steps, speed.

    Raises:
        EvaluationError: It was stopped before its last step.
    """
    history = History(read_records(run))
    heldout = history.series("loss", "heldout").values
    if not heldout or history.last_step is None or history.last_step["step"] < steps:
        raise EvaluationError(
            f"{run} has no held-out loss after step {steps}: it was stopped, or the loss is no number"
        )
    norms, speeds = (history.series(name).values for name in ("grad_norm", "tokens_per_second"))
    return {
        "loss": heldout[-1],
        "largest_norm": max(norms[_WARM_UP_STEPS:] or norms),
        "tokens_per_second": statistics.median(speeds[1:] or speeds),
    }


def child(module: str, *words: Any, lock: int | None = None, run: Path | None = None) -> None:
    """Runs a command of the project.

    Args:
        module: Of the command.
        words: Behind it.
        lock: Descriptor that it shall hold: what a killed comparison leaves running keeps another one out.
        run: Run folder of a training, which is to save and end when this process is killed.

    Raises:
        EvaluationError: It ended with another status than 0.
    """
    environment = {STATUS_DIR: str(run), LAUNCHER: str(os.getpid())} if run else None
    if status := run_module(module, *words, environment=environment, held=() if lock is None else (lock,)):
        raise EvaluationError(f"{module} ended with status {status}; its lines above say why")


def _hold_to_budget(settings: SystemsComparisonSettings, config: RunConfig, shards: Manifest | None) -> None:
    """Writes OUTPUT/budget.json, or refuses another budget than the one there."""
    tree = asdict(replace(config, data=type(config.data)()))
    budget = {f"{section}.{name}": value for section, values in tree.items() for name, value in values.items()}
    budget |= {"recall_steps": settings.recall_steps, "samples": settings.samples}
    if shards is not None:
        budget["data"] = shards.fingerprint
    file = settings.output / "budget.json"
    before = read_json(file) if file.is_file() else {}
    for name, value in json.loads(json.dumps(budget)).items():
        if before.get(name, value) != value:
            raise EvaluationError(
                f"--output {settings.output} was begun with {name} {before[name]}, now it is {value}: results would "
                "not compare; ask for the same, or give another --output"
            )
    write_json(file, before | budget)

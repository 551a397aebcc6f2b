"""`python -m evals.quickstart --run RUN`, which launch/quickstart.sh calls: its stages, top to bottom."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evals.command_line import parse_settings, run_command
from evals.niah import templates
from evals.quickstart.page import Page, Results
from evals.quickstart.stages import Lanes, Show, Stage, niah_progress, training_progress
from evals.report import bytes_text, read_json, seconds_text

if TYPE_CHECKING:
    from evals.models import EvalModel

KEPT = Path("evals/results/recall/mag/run")
NEEDLE = ("gentle-otter", "4807215")
RECALL = (
    ("lists", 256, 0.05, ("--lists",)),
    ("short", 256, 0.4, ("--repeats", "6", "--questions", "3", "--other-words", "0.5")),
    ("long", 2_048, 0.3, ("--needles", "3", "--repeats", "2", "--questions", "3", "--other-words", "0.5")),
)
"""Documents to learn recall from: what they are called, their tokens, their share of what is trained on, what they are
made with. Lists come to nothing but teach to recall at all, short ones to recall a number, long ones to pass over
noise (evals/results/recall/README.md)."""
TEXT_SHARE = 0.25
HELDOUT = "0.05"  # of the text: one hundredth of a library is too little for a smooth line
BASELINE = "transformer"
LOSS_LENGTH, LOSS_TOKENS = "2048", "65536"
DEPTHS, SAMPLES = 5, 2
PROMPT = "    def read(self"


@dataclass(frozen=True)
class QuickstartSettings:
    """Trains a small Titans and a Transformer++ beside it, compares them and exports the first, in minutes.

    Run again, it goes on where it stopped. RUN/report.html is what it found.
    """

    run: Path
    """Folder of everything it writes."""
    input: tuple[str, ...] = ("stdlib",)
    """Texts, as tokenization takes them."""
    tokenizer: Path | None = None
    """An existing tokenizer; by default one is trained."""
    variant: str = "mag"
    """Token mixer."""
    steps: int | None = None
    """Training steps; by default those of the preset."""
    lengths: tuple[int, ...] = (1_024, 4_096, 16_384, 65_536)
    """Tokens of the haystacks."""
    processes: int = 2
    """Of a training."""
    verbose: bool = False
    """Print the lines of every command in place of bars."""


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(QuickstartSettings, "python -m evals.quickstart")
    began = time.monotonic()
    show = Show(settings.run, settings.verbose)
    preparing = Lanes(prepare(settings), show)
    show.say("\nWhile text and tokens are prepared: a model that is kept in this repository, trained for 10 minutes\n")
    kept = ask_the_kept_model(settings.run)
    show.say(kept + "\n")
    preparing.finish()
    show.say("\nNow one like it, trained here, and a Transformer++ with the same window\n")
    Lanes([train(settings)], show).finish()
    show.say("\nBoth are measured on text and needles that they were not trained on\n")
    Lanes(measure(settings), show).finish()
    page = make_page(settings, kept)
    page.write()
    show.say(f"\n{page.table()}\n\n{what_next(settings.run, time.monotonic() - began)}")


def python(module: str, *words: object) -> list[str]:
    """A command of this project."""
    return [sys.executable, "-m", module, *map(str, words)]


def prepare(settings: QuickstartSettings) -> list[list[Stage]]:
    """Tokenizer and shards of the text, and documents to learn recall from."""
    run, recall, file = settings.run, settings.run / "recall", settings.run / "tokenizer" / "tokenizer.model"
    file.parent.mkdir(parents=True, exist_ok=True)
    words = recall / "words.jsonl"  # pieces of their own make the documents of recall short
    trained = [
        python("evals.niah.training_data", "--output", words, "--documents", 3000, "--most-lines", 1),
        python("tokenization.train", "--input", *settings.input, words, "--vocab-size", 2048, "--output", file),
    ]
    given = [["cp", str(settings.tokenizer), str(file)]]
    encode = python("tokenization.encode", "--tokenizer", file, "--workers", 2, "--input")
    text = [*encode, *settings.input, "--output", str(run / "shards"), "--heldout-fraction", HELDOUT]
    documents = []
    for kind, tokens, share, more in RECALL:
        source, count = recall / f"{kind}.jsonl", int(share * training_tokens(settings) / tokens * 1.25) + 300
        made_of = ("--output", source, "--tokens", tokens, "--tokenizer", file, "--documents", count, *more)
        to_tokens = [*encode, str(source), "--output", str(recall / kind), "--heldout-fraction", "0.1"]
        documents += [python("evals.niah.training_data", *made_of), to_tokens]
    last = recall / RECALL[-1][0] / "manifest.json"
    stages = [
        Stage("tokenizer", "Tokenizer", given if settings.tokenizer else trained, file.is_file),
        Stage("shards", "Text to tokens", [text]),
        Stage("recall", "Documents of recall", documents, last.is_file),
    ]
    return [stages]


def training_tokens(settings: QuickstartSettings) -> int:
    """Tokens of a training."""
    from pretrain.config.files import read_config

    train = read_config("quickstart")[0]["train"]
    return (settings.steps or train["steps"]) * train["global_batch"] * train["sequence_length"]


def beside(settings: QuickstartSettings) -> list[tuple[str, Path]]:
    """The models and their runs: what was asked for, and a Transformer++ unless that is one."""
    return list({BASELINE: settings.run / BASELINE, settings.variant: settings.run}.items())[::-1]


def train(settings: QuickstartSettings) -> list[Stage]:
    """Both trainings, on the same samples in the same order."""
    blend = [f"{settings.run / 'shards'}={TEXT_SHARE}"]
    blend += [f"{settings.run / 'recall' / kind}={share}" for kind, _, share, _ in RECALL]
    more = ["--train.steps", str(settings.steps)] if settings.steps else []
    torchrun = ["bash", "launch/torchrun.sh", "--config", "quickstart", "--nproc", str(settings.processes)]
    return [
        Stage(
            f"pretrain-{variant}",
            f"Train {variant}",
            [[*torchrun, "--variant", variant, "--run-dir", str(run), "--data.blend", *blend, *more]],
            progress=training_progress(run, lambda: blend_entropy(settings.run)),
        )
        for variant, run in beside(settings)
    ]


def measure(settings: QuickstartSettings) -> list[list[Stage]]:
    """A lane a model, so that both cores have work: loss by position, S-NIAH, and the export of the first."""
    from titans_mcore.config import TitansConfig

    lanes = []
    for variant, run in beside(settings):
        memory = any(mixer.memory for mixer in TitansConfig(variant=variant).mixers)
        out = run / "eval"
        words: tuple[object, ...] = ("--checkpoint", run, "--data", settings.run / "shards")
        words = (*words, "--length", LOSS_LENGTH, "--tokens", LOSS_TOKENS, "--output")
        losses = python("evals.position_perplexity", *words, out)
        lane = [Stage(f"loss-{variant}", f"Loss, {variant}", [losses], made(out / "position_perplexity.json", run))]
        if memory:
            file, off = out / "memory_off" / "position_perplexity.json", (*words, out / "memory_off", "--memory-off")
            title, command = f"Loss, {variant} without memory", python("evals.position_perplexity", *off)
            lane.append(Stage(f"loss-{variant}-off", title, [command], made(file, run)))
        words = ("--checkpoint", run, "--output", out, "--lengths", *settings.lengths, "--depths", DEPTHS)
        words = (*words, "--samples", SAMPLES, "--max-new-tokens", 16)
        command = python("evals.niah", *words, *(("--controls", "memory_reset") if memory else ()))
        tokens = sum(settings.lengths) * DEPTHS * SAMPLES * (1 + memory)
        progress = niah_progress(out / "niah.jsonl", tokens)
        lane.append(Stage(f"niah-{variant}", f"Needles, {variant}", [command], made(out / "niah.json", run), progress))
        lanes.append(lane)
    words = ("--checkpoint", settings.run, "--output", settings.run / "hf")
    title, command = "Export, compared with the run", python("titans_mcore.hf.convert", *words)
    lanes[-1].append(Stage("export", title, [command], made(settings.run / "hf" / "proof.json", settings.run)))
    return lanes


def made(file: Path, run: Path) -> Callable[[], bool]:
    """Whether a file was made from the run's newest checkpoint."""

    def done() -> bool:
        newest = max((found.stat().st_mtime for found in run.glob("checkpoints/step-*/checkpoint.json")), default=0.0)
        return file.is_file() and file.stat().st_mtime > newest

    return done


def ask_the_kept_model(run: Path) -> str:
    """A needle in 65,000 tokens for the model that is kept here, with and without its memory; what came of it."""
    from evals.ask import answer_line, read_text
    from evals.measure import state_bytes
    from evals.models import load_model
    from evals.niah.controls import without_memory

    key, value = NEEDLE
    text, question = run / "needle.txt", templates.QUESTION.format(key=key)
    lines = [templates.NOISE] * 2_640
    needle = templates.NEEDLE.format(key=key, value=value)
    lines.insert(len(lines) // 3, needle)
    text.write_text("\n".join([templates.OPENING, *lines]) + "\n", encoding="utf-8")
    model, began = load_model(KEPT), time.monotonic()
    memory = read_text(model, text, 2_048)
    seconds = time.monotonic() - began
    reset = replace(memory, states=without_memory(memory.states, model.config))
    said = [answer_line(model, kept, question, 16) for kept in (memory, reset)]
    return (
        f"  hidden    {needle}\n"
        f"  in        {memory.tokens:,} tokens of noise ({text}), read in {seconds:.1f} s; "
        f"{bytes_text(state_bytes(memory.states))} are kept of them\n"
        f"  asked     {question} ...\n"
        f"  answer    {said[0]}\n"
        f"  with its memory reset before the question: {said[1]}"
    )


def blend_entropy(run: Path) -> float:
    """Nats a token that counting words reaches on what is trained on, each folder with counts of its own."""
    folders = [(run / "shards", TEXT_SHARE), *((run / "recall" / kind, share) for kind, _, share, _ in RECALL)]
    entropies = [(json.loads((folder / "manifest.json").read_text())["unigram_entropy"], s) for folder, s in folders]
    return sum(entropy * share for entropy, share in entropies) / sum(share for _, share in entropies)


def make_page(settings: QuickstartSettings, kept: str) -> Page:
    """All that was found."""
    from evals.models import load_model, random_weights

    model = load_model(settings.run)
    before = sentence(replace(model, network=random_weights(model)))
    names = {variant: " + ".join(m.paper for m in load_model(run).config.mixers) for variant, run in beside(settings)}
    return Page(
        settings.run,
        [Results(names[variant], run) for variant, run in beside(settings)],
        read_json(settings.run / "shards" / "manifest.json")["unigram_entropy"],
        blend_entropy(settings.run),
        [
            (f"{names[settings.variant]} before training", before),
            ("The same after training", sentence(model)),
            ("A model kept in the repository, on a needle in 65,000 tokens", kept),
        ],
    )


def sentence(model: "EvalModel") -> str:
    """A sentence that the model draws from a beginning, always with the same luck."""
    import torch

    from evals.niah.generate import read

    processor, luck = model.tokenizer.processor, torch.Generator().manual_seed(0)
    ids = [processor.bos_id(), *processor.encode(PROMPT)]
    logits, states = read(model.stream, [torch.tensor([ids])], lambda _: None)
    for _ in range(60):
        token = torch.multinomial((logits[0].float().cpu() / 0.5).softmax(-1), 1, generator=luck)
        ids.append(int(token))
        logits, states = read(model.stream, [token[None]], lambda _: None, states)
    return processor.decode(ids)


def what_next(run: Path, seconds: float) -> str:
    """Where things are, and what to try."""

    question = templates.QUESTION.format(key=NEEDLE[0])
    return f"""All in {seconds_text(seconds)}. On one page, to open in a browser: {run}/report.html

What next?
  Ask it about a text:  .venv/bin/python -m evals.ask --checkpoint {run} --text {run}/needle.txt \\
                            --save-memory {run}/needle.safetensors --question "{question}"
  Again, unread:        the same with --memory {run}/needle.safetensors in place of --text and --save-memory
  Train longer:         bash launch/torchrun.sh --config quickstart --run-dir runs/longer \\
                            --data.path {run}/shards --train.steps 3000
  Another variant:      bash launch/quickstart.sh --variant lmm
  Use the export:       .venv/bin/python -c "from transformers import pipeline; \\
                            print(pipeline('text-generation', '{run}/hf', trust_remote_code=True)('def read(')[0])"
"""


if __name__ == "__main__":
    run_command(main)

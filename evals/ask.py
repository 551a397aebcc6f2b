"""Asks a model about a text: `python -m evals.ask --checkpoint RUN --text FILE --question "..."`."""

import hashlib
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.command_line import EvaluationError, ModelOptions, check_at_least, parse_settings, run_command
from titans_mcore.command_line import try_output
from titans_mcore.io import commit_file

if TYPE_CHECKING:
    from evals.models import EvalModel

FORMAT_VERSION = 1
_HEADER = "titans_memory"
_MOST_TOKENS = 2**40


@dataclass(frozen=True)
class AskSettings(ModelOptions):
    """Reads a text once, of any length and in constant memory, and goes on from each question with the model's words.

    What the model keeps of the text is a file of its own, if you like: some hundred kB apart from the weights, from
    which more is asked later without reading again. The answer is a line on the standard output.
    """

    question: tuple[str, ...] = ()
    """What stands on a line of its own behind the text. These models go on with a text, so it ends where the answer is
    to begin; one that learned from documents of S-NIAH answers 'What is the special magic number for KEY mentioned in
    the provided text? The special magic number for KEY mentioned in the provided text is'."""
    text: Path | None = None
    """UTF-8 text to read."""
    memory: Path | None = None
    """In place of --text: a file that --save-memory wrote."""
    save_memory: Path | None = None
    """File (.safetensors) to keep what the model remembers of the text."""
    max_new_tokens: int = 64
    """Most tokens of an answer; it ends with its line."""
    piece: int = 2_048
    """Tokens read at a time; bounds the memory."""

    def __post_init__(self) -> None:
        check_at_least(1, self, "max_new_tokens", "piece")
        if (self.text is None) == (self.memory is None):
            raise EvaluationError("give either --text, a file to read, or --memory, what was kept of one")
        if self.memory is not None and self.save_memory is not None:
            raise EvaluationError(
                "--save-memory keeps what is read from --text, and --memory reads nothing; leave one out"
            )
        if not self.question and self.save_memory is None:
            raise EvaluationError("nothing is asked; give --question, or --save-memory to ask later")
        if not all(map(str.strip, self.question)):
            raise EvaluationError("a --question is empty; give the words behind which the answer is to begin")
        for option, file in (("--text", self.text), ("--memory", self.memory)):
            if file is not None and not file.is_file():
                raise EvaluationError(
                    f"{option} {file}: {'is a folder' if file.is_dir() else 'no such file'}; give a file"
                )
        if self.save_memory is not None:
            try_output(self.save_memory, "--save-memory", folder=False)


@dataclass(frozen=True)
class TextMemory:
    """What a model keeps of a text."""

    states: list[Any]
    """A TensorTree a block, each tensor contiguous and of its own, so that asking now and later are the same bits."""
    tokens: int
    """Tokens read, the start token included."""
    last_token: int
    """The last of them."""
    source: str
    """The text's name and sha256."""

    def digest(self) -> str:
        """sha256 over the states."""
        found = hashlib.sha256()
        for state in self.states:
            for name, tensor in state.state_dict().items():
                found.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
                found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()


def read_text(model: "EvalModel", text: Path, piece: int) -> TextMemory:
    """Reads a text behind a start token, with a bar on a terminal.

    Args:
        model: The model.
        text: UTF-8; bytes that are not are read as replacement characters.
        piece: Tokens read at a time.

    Raises:
        EvaluationError: It cannot be read, or there is nothing in it.
    """
    import numpy as np
    import torch

    from evals.niah.generate import read
    from evals.tokens import DiskTokens, encode_text
    from titans_mcore.io import sha256_of
    from tokenization.progress import Progress

    with tempfile.TemporaryFile() as file:
        try:
            tokens = encode_text(text, model.tokenizer.processor, file, _MOST_TOKENS)
            source = f"{text.name}, sha256 {sha256_of(text)}"
        except OSError as fault:
            raise EvaluationError(f"--text {text}: cannot be read ({fault.strerror})") from None
        file.flush()
        ids = DiskTokens(file, 0, tokens)
        if tokens < 2:
            raise EvaluationError(f"--text {text}: there is no text in it; give another file")
        with Progress(f"of {text.name} read", tokens) as progress:
            starts = range(0, tokens, piece)
            pieces = (torch.from_numpy(np.asarray(ids[at : at + piece]))[None] for at in starts)
            _, states = read(model.stream, pieces, lambda units: progress.advance(units, units))
        return TextMemory(
            [state.carried() for state in states], tokens, int(np.asarray(ids[tokens - 1 : tokens])[0]), source
        )


def answer_line(model: "EvalModel", memory: TextMemory, question: str, max_new_tokens: int) -> str:
    """What the model goes on with behind a text and a question, to the end of the line; the memory stays as it is.

    Args:
        model: The model that read the text.
        memory: What it kept.
        question: Stands on a line of its own.
        max_new_tokens: Most tokens of the answer.
    """
    import torch

    from evals.niah.generate import answer, read

    ids = torch.tensor([question_ids(model, memory, question)])
    logits, states = read(model.stream, [ids], lambda _: None, memory.states)
    processor = model.tokenizer.processor
    (words,) = answer(model.decoder, logits, states, max_new_tokens, processor.eos_id(), lambda: None)
    return processor.decode(words).strip().split("\n")[0]


def question_ids(model: "EvalModel", memory: TextMemory, question: str) -> list[int]:
    """Tokens of a question on a line of its own behind the text that was read."""
    from evals.niah.haystacks import Splicer

    line_feed, *ids = Splicer(model.tokenizer.processor).behind("\n", question)
    return ids if memory.last_token == line_feed else [line_feed, *ids]


def save_memory(memory: TextMemory, model: "EvalModel", file: Path) -> None:
    """Writes a memory as safetensors, whole or not at all, with what it belongs to in the header.

    Args:
        memory: What to write.
        model: Whose it is.
        file: Where to.
    """
    from titans_mcore.hf.cache_titans import TitansCache

    record = {
        "format_version": FORMAT_VERSION,
        "variant": model.config.variant,
        "checkpoint_sha256": model.checkpoint_sha256,
        "tokenizer_sha256": model.tokenizer.sha256,
        "last_token": memory.last_token,
        "source": memory.source,
        "states_sha256": memory.digest(),
    }
    cache = TitansCache(len(memory.states))
    for block, state in zip(cache.blocks, memory.states, strict=True):
        block.advance(state, memory.tokens)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".memory-") as folder:
        cache.save(Path(folder) / file.name, {_HEADER: json.dumps(record)})
        commit_file(Path(folder) / file.name, file)


def load_memory(file: Path, model: "EvalModel") -> TextMemory:
    """The memory that `save_memory` wrote for these very weights.

    Raises:
        EvaluationError: The file is damaged, no memory, of another version, or of other weights or another tokenizer.
    """
    from safetensors import SafetensorError, safe_open

    from titans_mcore.hf.cache_titans import TitansCache

    try:
        with safe_open(file, "pt") as opened:
            header = (opened.metadata() or {}).get(_HEADER)
        if header is None:
            raise EvaluationError(f"--memory {file}: is no memory of a text; give a file that --save-memory wrote")
        record = json.loads(header)
        if (version := record["format_version"]) != FORMAT_VERSION:
            raise EvaluationError(
                f"--memory {file}: has format {version}, and this version reads {FORMAT_VERSION}; read the text again"
            )
        for name, mine in (("checkpoint", model.checkpoint_sha256), ("tokenizer", model.tokenizer.sha256)):
            if (theirs := record[f"{name}_sha256"]) != mine:
                raise EvaluationError(
                    f"--memory {file}: belongs to another {name} ({record['variant']}, sha256 {theirs[:12]}; that of "
                    f"{model.checkpoint} is {mine[:12]}); give the one it was saved with, or read the text again"
                )
        cache = TitansCache.load(file, model.device)
        states = [block.state for block in cache.blocks]
        memory = TextMemory(states, cache.get_seq_length(), record["last_token"], record["source"])
        damaged = memory.digest() != record["states_sha256"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError) as fault:
        raise EvaluationError(f"--memory {file}: is damaged ({fault!r}); read the text again") from None
    if damaged:
        raise EvaluationError(f"--memory {file}: is damaged (its numbers are not those written); read the text again")
    return memory


def what_it_sees(model: "EvalModel", tokens: int) -> str | None:
    """What a model that has nothing but windows sees of a text, in a sentence; None for models that keep a state."""
    config = model.config
    if any(mixer.memory or mixer.reach(config) == 0 for mixer in config.mixers):
        return None
    if not config.window:
        return f"{config.variant} has no memory: it keeps the keys of all {tokens:,} tokens"
    reach = config.num_layers * (config.window - 1) + 1
    return (
        f"{config.variant} has no memory: a block sees {config.window} tokens, all {config.num_layers} together the "
        f"last {min(reach, tokens):,} of the {tokens:,}"
    )


def main() -> None:
    """Runs the command line; see `--help`."""
    settings = parse_settings(AskSettings, "python -m evals.ask")
    from evals.measure import state_bytes
    from evals.report import bytes_text

    model = settings.load()
    if settings.save_memory is not None and (sight := what_it_sees(model, 0)):
        raise EvaluationError(f"--save-memory: {sight.split(':')[0]}; leave the option out, or give a Titans")
    began = time.perf_counter()
    if settings.text is not None:
        memory = read_text(model, settings.text, settings.piece)
        seconds = time.perf_counter() - began
        cost = f"{memory.tokens:,} tokens in {seconds:.1f} s, {memory.tokens / seconds:,.0f} a second"
    else:
        assert settings.memory is not None
        memory = load_memory(settings.memory, model)
        cost = f"{memory.tokens:,} tokens, read before ({memory.source.split(',')[0]})"
    print(f"{cost}; kept of them: {bytes_text(state_bytes(memory.states))}", file=sys.stderr, flush=True)
    if sight := what_it_sees(model, memory.tokens):
        print(f"note: {sight}", file=sys.stderr)
    if settings.save_memory is not None:
        save_memory(memory, model, settings.save_memory)
        print(f"{settings.save_memory}: ask it later with --memory", file=sys.stderr)
    for question in settings.question:
        print(answer_line(model, memory, question, settings.max_new_tokens), flush=True)


if __name__ == "__main__":
    run_command(main)

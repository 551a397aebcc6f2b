"""Documents with answers, as files of JSON lines: what recall is learned from."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from evals.command_line import EvaluationError
from titans_mcore.io import PartialFile


class Document(NamedTuple):
    """One document.

    Attributes:
        text: All of it.
        answers: Characters [start, end) of it that answer; None where all of it is to be learned.
    """

    text: str
    answers: Sequence[tuple[int, int]] | None = None


def write_documents(output: Path, documents: Iterable[Document]) -> None:
    """Writes a file that tokenization and evals.finetune take, once it is whole, and says how many documents there are.

    Args:
        output: The file; its folder is made when missing. A line is {"text": ..., "answers": [[start, end], ...]}.
        documents: What it holds.

    Raises:
        EvaluationError: It cannot be written.
    """
    count = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with PartialFile(output) as partial:
            for text, answers in documents:
                line = {"text": text} if answers is None else {"text": text, "answers": answers}
                partial.file.write((json.dumps(line) + "\n").encode())
                count += 1
            partial.commit()
    except OSError as error:
        raise EvaluationError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{output}: {count:,} documents")


def read_documents(file: Path) -> Iterator[Document]:
    """The documents of such a file.

    Raises:
        EvaluationError: It cannot be read, or a line is no document; which, it says.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                try:
                    content = json.loads(line)
                    text, answers = content["text"], content.get("answers")
                    if answers is not None:
                        answers = [(int(start), int(end)) for start, end in answers]
                        if not all(0 <= start < end <= len(text) for start, end in answers):
                            raise ValueError(f"answers {answers} of {len(text)} characters")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise EvaluationError(
                        f"--documents {file}, line {number}: {type(error).__name__}: {error}; a line is "
                        '{"text": ..., "answers": [[start, end], ...]}, characters of the text'
                    ) from None
                yield Document(text, answers)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise EvaluationError(f"--documents {file}: cannot be read ({reason})") from None

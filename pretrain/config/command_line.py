"""The command line of a run: `--config NAME --run-dir DIR` and a flag for every setting, `--train.steps 300`."""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import tyro

from pretrain.config.files import build, read_config, setting_names, unknown_setting
from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TEXTS
from titans_mcore.config import TitansConfig

_FLAGS = ("--config", "--run-dir", "--variant")
_SWITCHES = ("--verify-resume", "--print")
_USAGE = "python -m pretrain.train --config NAME --run-dir DIR [--SECTION.SETTING VALUE ...]"
_DESCRIPTION = """Trains a model: --config NAME is a preset such as mac_760m or a TOML file, --run-dir DIR takes
everything that the run writes, and each flag below overrides one setting of the preset. --variant X is short for
--model.variant X. --print shows all settings as TOML and trains nothing. A run folder that holds checkpoints is
continued; --verify-resume has it compute the loss of a sample first, which must be the one that was noted when the
checkpoint was saved."""


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for."""

    config: RunConfig
    """The settings, complete."""
    run_dir: Path
    """Folder that takes everything the run writes."""
    verify_resume: bool = False
    """Compare a loss with the checkpoint's before going on from it."""
    assumed_vocabulary: bool = False
    """Whether the vocabulary stands for that of data which is not there yet."""


def parse(arguments: Sequence[str], *, planning: bool = False) -> CommandLine:
    """Reads a command line and the files that it names.

    Args:
        arguments: What follows the command.
        planning: Nothing is trained, as with `--print`: neither the run folder nor the data need be named.

    Raises:
        ValueError: Something is unknown, missing or illegal; the message says what and what to do.
        SystemExit: After `--help` or `--print` (0), or a value of the wrong type (2).
    """
    if "--help" in arguments or "-h" in arguments:
        tyro.cli(tyro.conf.FlagConversionOff[RunConfig], args=["--help"], prog=_USAGE, description=_DESCRIPTION)
    named, overrides = _split(arguments)
    training = not planning and "--print" not in named
    for flag in ("--config", "--run-dir") if training else ("--config",):
        if flag not in named:
            raise ValueError(f"{flag} is missing; usage: {_USAGE}")
    if "--variant" in named:
        overrides["model.variant"] = named["--variant"]
    tree, source = read_config(named["--config"])
    config = _override(build(tree, source), overrides)
    # RUN/config.toml is read back in another working directory perhaps.
    config = replace(config, data=config.data.absolute())
    lacking = "vocab_size" not in tree.get("model", {}) and "model.vocab_size" not in overrides
    assumed = lacking and not training and not config.data.folders
    if lacking and not assumed:
        config = replace(config, model=_with_vocabulary_of_data(config))
    if "--print" in named:
        if assumed:
            print("# without data.path, model.vocab_size is the default")
        print(tomli_w.dumps(asdict(config)), end="")
        raise SystemExit(0)
    return CommandLine(config, Path(named.get("--run-dir", "")), "--verify-resume" in named, assumed)


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, Any]]:
    """Our own flags by name, and the settings by dotted name: a text, or a tuple of texts where it takes several."""
    named: dict[str, str] = {}
    settings: dict[str, Any] = {}
    known = setting_names()
    words = deque(arguments)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r} on the command line; settings are written --section.setting value")
        if flag not in (*_FLAGS, *_SWITCHES) and name not in known:
            raise ValueError(unknown_setting(flag, "the command line", [*_FLAGS, *_SWITCHES, *map(_flag, known)]))
        if word in _SWITCHES:
            named[word] = ""
            continue
        if not equals:
            value = words.popleft() if words else "--"
        if value.startswith("--"):
            raise ValueError(f"{flag} needs a value")
        if flag in _FLAGS:
            named[flag] = value
        elif known[name] == TEXTS:
            settings[name] = (value,)
            while words and not words[0].startswith("--"):
                settings[name] += (words.popleft(),)
        else:
            settings[name] = value
    return named, settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _override(base: RunConfig, settings: dict[str, Any]) -> RunConfig:
    types = setting_names()
    tree: dict[str, dict[str, Any]] = {}
    for name, text in settings.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = _value(name, text, types[name])
    # All at once: two settings that only fit together may change in one command.
    sections = {section: replace(getattr(base, section), **values) for section, values in tree.items()}
    return replace(base, **sections)


def _value(name: str, text: Any, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text) if kind in (int, float) else text
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"{_flag(name)} is {text!r}; it must be {expected}") from None


def _with_vocabulary_of_data(config: RunConfig) -> TitansConfig:
    from tokenization.manifest import Manifest  # only here, so that --help needs no more than the settings

    if not config.data.folders:
        raise ValueError("data.path is missing: name the folder of shards with --data.path DIR")
    return replace(config.model, vocab_size=Manifest.load(Path(next(iter(config.data.folders)))).tokenizer.vocab_size)

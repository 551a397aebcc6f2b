"""A small tokenizer, runs with random tiny models, and held-out shards."""

import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from titans_mcore.config import TitansConfig
from titans_mcore.io import sha256_of
from tokenization.tokenizer import llama_settings

from .babi import write_babi, write_books

WORDS = ("the", "grass", "sky", "number", "text", "hidden", "magic", "is", "are", "special", "1", "27", "345", "learns")


def train_tokenizer(vocab_size: int) -> bytes:
    generator = random.Random(7)
    lines = (" ".join(generator.choices(WORDS, k=12)) + "." for _ in range(400))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **llama_settings(vocab_size))
    return model.getvalue()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(360))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that spin for each other would make these small operations wait wherever a core is taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def babi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_babi(tmp_path_factory.mktemp("en-10k"))


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("pg19"))


MakeRun = Callable[..., Path]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> MakeRun:
    """A run folder as training leaves it, with random weights."""
    from megatron.core import parallel_state

    from titans_mcore import parallel, weights
    from titans_mcore.model import TitansModel

    seeds = count(1)  # each run has weights of its own, and none those of 0, which a control takes as before training

    def make(variant: str = "mac", **settings: object) -> Path:
        run = tmp_path_factory.mktemp(variant)
        sizes = {"vocab_size": 360, "num_layers": 2, "dim": 32, "num_heads": 2, "ffn_dim": 64, "init_std": 0.2}
        memory = {"memory_heads": 2, "memory_expansion": 2, "persistent_tokens": 4, "segment_length": 64, "window": 64}
        config = TitansConfig(variant=variant, **{**sizes, **memory, "linear_heads": 2, **settings})  # type: ignore[arg-type]
        if not parallel_state.model_parallel_is_initialized():
            parallel.start(1, seed=0)
        torch.manual_seed(next(seeds))
        model = TitansModel(config, parallel.transformer_config(config))
        checkpoint = run / "checkpoints" / "step-00000001"
        header, values = weights.ShardHeader.of(model), weights.model_tensors(model).items()
        weights.save_shard(checkpoint / "weights", header, values, config, rank=0, size=1, step=1, tokens=1)
        files = [file for file in checkpoint.rglob("*") if file.is_file()]
        listed = {
            str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in files
        }
        (checkpoint / weights.MARKER).write_text(json.dumps({"files": listed}))
        (run / "tokenizer").mkdir()
        shutil.copy(tokenizer, run / "tokenizer" / "tokenizer.model")
        (run / "config.toml").write_text("[train]\nsequence_length = 128\n")
        return run

    return make


@pytest.fixture(scope="session")
def mac_run(make_run: MakeRun) -> Path:
    return make_run("mac")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out documents of odd lengths, 2,000 tokens in all."""
    folder = tmp_path_factory.mktemp("shards")
    write_heldout(folder, np.random.default_rng(0).integers(3, 360, 2_000), [301, 7, 1, 692, 999])
    return folder


def write_heldout(folder: Path, tokens: np.ndarray, lengths: list[int]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "heldout.bin"), np.uint16)
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        builder.add_document(document.astype(np.uint16), [len(document)])
    builder.finalize(str(folder / "heldout.idx"))


def spoil_code(folder: Path) -> Path:
    """Has an exported folder's code leave a file when it runs, by every way that transformers knows.

    Returns:
        The file that must not appear.
    """
    ran = folder / "ran"
    line = f"\nopen({str(ran)!r}, 'w').close()\n"
    for file in folder.glob("*.py"):
        file.write_text(file.read_text() + line)
    (folder / "other.py").write_text(line)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(line + "def generate(*_, **__): ...\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        ways = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
        content["auto_map"] = dict.fromkeys(ways, "other.Other") | {"AutoTokenizer": ["other.Other", "other.Other"]}
        (folder / name).write_text(json.dumps(content))
    return ran

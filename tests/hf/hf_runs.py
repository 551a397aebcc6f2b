"""Tiny runs: a random model's checkpoint with a tokenizer beside it, as pretraining leaves them."""

import io
import json
import random
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.weights import MARKER, ShardHeader, load_into, model_tensors, save_shard

VOCABULARY = 330
WORDS = (
    "the",
    "memory",
    "of",
    "a",
    "model",
    "learns",
    "at",
    "test",
    "time",
    "surprise",
    "tells",
    "keep",
    "aaa",
    "abab",
)
TINY = {
    "vocab_size": VOCABULARY,
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "memory_heads": 2,
    "linear_heads": 4,
    "ffn_dim": 40,
    "init_std": 0.2,  # large enough for the logits to say something
    "persistent_tokens": 3,
    "chunk_size": 4,
    "segment_length": 8,
    "window": 9,
}


def tiny(**settings: Any) -> TitansConfig:
    return TitansConfig(**{**TINY, **settings})


def save_run(run: Path, config: TitansConfig, tokenizer: Path | None = None, seed: int = 0) -> Path:
    """A run folder with one checkpoint of a random model."""
    start(1, seed=seed)
    try:
        model = TitansModel(config, transformer_config(config))
    finally:
        stop()
        torch.set_num_threads(1)
    with torch.no_grad():  # norms and gates too: a parameter left out must show
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    checkpoint = run / "checkpoints" / "step-00000010"
    values = model_tensors(model).items()
    save_shard(checkpoint / "weights", ShardHeader.of(model), values, config, rank=0, size=1, step=10, tokens=5120)
    files = {
        str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size}
        for file in checkpoint.rglob("*")
        if file.is_file()
    }
    (checkpoint / MARKER).write_text(json.dumps({"step": 10, "tokens": 5120, "files": files}))
    if tokenizer is not None:
        (run / "tokenizer").mkdir(parents=True)
        (run / "tokenizer" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    return run


def train_tokenizer(file: Path, **settings: Any) -> Path:
    """A small sentencepiece model of Llama-2's kind, with other settings where given."""
    generator = random.Random(0)
    lines = [" ".join(generator.choice(WORDS) for _ in range(12)) + "  x = 1984\n" for _ in range(300)]
    lines += ["é ü 記憶 " + "    " * n + "if" for n in range(1, 20)]
    model = io.BytesIO()
    chosen = {
        "model_type": "bpe",
        "vocab_size": VOCABULARY,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99,
        "split_digits": True,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "minloglevel": 2,
        "num_threads": 1,
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **chosen)
    file.write_bytes(model.getvalue())
    return file


def native_logits(
    config: TitansConfig, weights: dict[str, Tensor], prompts: list[list[int]], cut: int
) -> dict[str, Tensor]:
    """Logits (T, V) of the model as it is trained: `whole.I` of prompt I, `pieces.I` read `cut` tokens at a time."""
    start(1, seed=0)
    try:
        model = TitansModel(config, transformer_config(config)).eval()
        load_into(model, weights)
        logits = {}
        with torch.inference_mode():
            for index, prompt in enumerate(prompts):
                tokens, states, pieces = torch.tensor([prompt]), None, []
                logits[f"whole.{index}"] = model(tokens)[0]
                for piece in tokens.split(cut, 1):
                    out, states = model.stream(piece, states)
                    pieces.append(out[0])
                logits[f"pieces.{index}"] = torch.cat(pieces)
        return logits
    finally:
        stop()

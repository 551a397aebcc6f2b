"""Models whose blocks take turns between mixers; what trains, resumes and exports them is in test_added_mixer.py."""

import re
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.carried import CarriedState
from titans_mcore.config import TitansConfig
from titans_mcore.mixers import MIXERS
from titans_mcore.model import TitansModel
from titans_mcore.parallel import start, stop, transformer_config
from titans_mcore.telemetry import MemoryTelemetry

SETTINGS = {"vocab_size": 96, "dim": 32, "num_heads": 4, "memory_heads": 2, "ffn_dim": 40, "init_std": 0.2}
SETTINGS |= {"linear_heads": 2, "num_layers": 3, "persistent_tokens": 3, "chunk_size": 4, "segment_length": 8}
SETTINGS |= {"window": 9}
HYBRIDS = ["lmm+transformer", "mac+transformer", "mag+lmm+transformer"]
HYBRIDS += ["mamba+transformer", "mamba2+gated_deltanet+transformer"]  # Samba, Gated DeltaNet-H2


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    start(1, seed=0)
    yield
    stop()


def model_of(variant: str, **settings: object) -> TitansModel:
    config = TitansConfig(variant=variant, **SETTINGS | settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    return TitansModel(config, transformer_config(config)).eval()


def tokens_of(length: int) -> torch.Tensor:
    return torch.randint(96, (2, length), generator=torch.Generator().manual_seed(1))


def test_mixers_take_turns_over_the_blocks() -> None:
    config = TitansConfig(variant="lmm+transformer", num_layers=3)
    assert [mixer.name for mixer in config.blocks] == ["lmm", "transformer", "lmm"]
    model = model_of("lmm+transformer")
    assert [type(layer.mixer) for layer in model.layers] == [mixer.module for mixer in config.blocks]


@pytest.mark.parametrize("variant", HYBRIDS)
@torch.no_grad()
def test_a_stream_in_pieces_is_one_pass(variant: str) -> None:
    model, tokens, found, states = model_of(variant), tokens_of(41), [], None
    starts = torch.zeros(2, 41, dtype=torch.bool)
    starts[0, [7, 20]] = starts[1, 33] = True
    whole = model(tokens, starts=starts)
    for piece, begins in zip(tokens.split([5, 1, 8, 27], 1), starts.split([5, 1, 8, 27], 1), strict=True):
        logits, states = model.stream(piece, states, starts=begins if bool(begins.any()) else None)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)
    assert whole.std() > 0.1


@torch.no_grad()
def test_carried_states_come_back_by_block(tmp_path) -> None:
    model = model_of("mac+transformer")
    carried = CarriedState(model.titans_config)
    _, carried.states[0] = model(tokens_of(12), states=[])
    carried.save(tmp_path / "carried.safetensors")
    again = CarriedState(model.titans_config)
    again.restore(tmp_path / "carried.safetensors", torch.device("cpu"))
    assert [type(state) for state in again.states[0]] == [MIXERS[name].state for name in ("mac", "transformer", "mac")]
    file = load_file(tmp_path / "carried.safetensors")
    kept = {f"0.{i}.{name}": x for i, state in enumerate(again.states[0]) for name, x in state.state_dict().items()}
    assert kept.keys() == file.keys()
    assert all(torch.equal(kept[name], x) for name, x in file.items())


def test_telemetry_is_by_block() -> None:
    model = model_of("lmm+transformer")
    telemetry = MemoryTelemetry(model)
    with telemetry.watching():
        model(tokens_of(16))
    for values in telemetry.collect().values():
        assert [value is None for value in values] == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"variant": "lmm+mega"},
            "variant is 'lmm+mega'; it must be one of .*lmm, mac, .*, or several of them joined by",
        ),
        ({"variant": "lmm+mag", "num_layers": 1}, "lmm+mag has 2 mixers that take turns over num_layers 1"),
        ({"variant": "lmm+mac", "segment_length": 10}, "segment_length 10 is not a multiple"),
        ({"variant": "lmm+transformer", "num_heads": 5}, "dim 32 is not divisible by num_heads 5"),
    ],
)
def test_settings_must_fit_every_mixer(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence.replace("+", re.escape("+"))):
        TitansConfig(**SETTINGS | settings)  # type: ignore[arg-type]

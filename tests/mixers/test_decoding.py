"""States with room: one token after the other in the same shapes, and the same outputs."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_mcore.decoding import Decoder
from titans_mcore.memory import PackedRows

from .test_mixers import LENGTH, WITH_MEMORY, inputs, mixer_of

ATTENDING = [*WITH_MEMORY, "transformer"]


def decoded(mixer: Any, state: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Outputs of tokens that come one by one behind a state with room; the state after each is like it."""
    state, outputs = mixer.with_room(state), []
    described = [(x.shape, x.dtype) for x in state.tensors()]
    for token in tokens.split(1, 1):
        output, state = mixer(token, state)
        assert [(x.shape, x.dtype) for x in state.tensors()] == described
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("read", [3, 16, 37])
@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_tokens_behind_a_state_with_room_give_the_oracles_outputs(variant: str, read: int) -> None:
    """Chunks of 8, windows of 12 and segments of 16 end on the way."""
    x = inputs(torch.float64)
    expected, _ = mixer_of(variant, torch.float64, memory_backend="oracle", attention_backend="dense")(x, None)
    mixer = mixer_of(variant, torch.float64, memory_backend="chunked")
    _, state = mixer(x[:, :read], None)
    torch.testing.assert_close(decoded(mixer, state, x[:, read:]), expected[:, read:], rtol=0, atol=1e-10)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"memory_depth": 1, "memory_network": "plain"},
    {"memory_alpha": "channel"},
    {"memory_rule": "literal", "chunk_size": 1},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_every_kind_of_memory_has_room(settings: dict[str, Any]) -> None:
    mixer, x = mixer_of("mac", memory_backend="chunked", **settings), inputs()
    expected, _ = mixer(x, None)
    _, state = mixer(x[:, :5], None)
    torch.testing.assert_close(decoded(mixer, state, x[:, 5:]), expected[:, 5:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_rows_stand_at_different_places(variant: str) -> None:
    """After padding rows end their chunks, windows and segments at different tokens; a piece may follow."""
    x, read = inputs(torch.float64), 20
    mixer = mixer_of(variant, torch.float64, memory_backend="chunked")
    real = torch.arange(read) < torch.tensor([[read], [13]])
    _, state = mixer(x[:, :read], None, PackedRows(real=real))
    ours = decoded(mixer, state, x[:, read:])
    rows = x[:1], torch.cat([x[1:, :13], x[1:, read:]], 1)
    for row, whole in enumerate(rows):
        alone, _ = mixer(whole, None)
        torch.testing.assert_close(ours[row], alone[0, -ours.shape[1] :], rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_pieces_go_on_from_a_state_with_room(variant: str) -> None:
    x, mixer = inputs(torch.float64), mixer_of(variant, torch.float64, memory_backend="chunked")
    expected, _ = mixer(x, None)
    _, state = mixer(x[:, :29], None)
    _, state = mixer(x[:, 29:30], mixer.with_room(state))
    ours, _ = mixer(x[:, 30:], state)
    torch.testing.assert_close(ours, expected[:, 30:], rtol=0, atol=1e-10)
    assert LENGTH > 30


class Operations(TorchDispatchMode):
    """Notes what is done, and to which tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, list[Any]]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.done.append((str(func), [(x.shape, x.stride(), x.dtype) for x in tensors]))
        self.devices |= {x.device.type for x in tensors}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_a_decoder_repeats_the_same_operations_on_the_same_tensors(variant: str) -> None:
    """What a graph replays: three chunks, of which the states' tensors stay where they are."""
    x, mixer = inputs(torch.float64), mixer_of(variant, torch.float64, memory_backend="chunked")
    expected, _ = mixer(x, None)
    steps: list[Any] = []

    def step(token: torch.Tensor, states: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        with Operations() as operations:
            output, state = mixer(token, states[0])
        steps.append(operations.done)
        return output, [state]

    decoder = Decoder(step, [mixer], capture=lambda run: run)
    _, state = mixer(x[:, :20], None)
    states, places = [state], []
    for token in range(20, LENGTH):
        output, states = decoder(x[:, token : token + 1], states)
        torch.testing.assert_close(output, expected[:, token : token + 1], rtol=0, atol=1e-10)
        places.append([tensor.data_ptr() for tensor in states[0].tensors()])
    captured = steps[-24:]
    assert all(done == captured[0] for done in captured)
    assert all(place == places[-1] for place in places[-24:])


@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_no_value_and_no_tensor_of_another_device_decides_what_is_done(variant: str) -> None:
    """A GPU that captures cannot be asked for a value: neither can a device without any."""
    x, mixer = inputs(), mixer_of(variant, memory_backend="chunked")
    _, state = mixer(x[:, :20], None)
    state, token, mixer = mixer.with_room(state).to("meta"), x[:, :1].to("meta"), mixer.to("meta")
    with Operations() as operations:
        mixer(token, state)
    assert operations.devices == {"meta"}
    assert not any("lift" in name for name, _ in operations.done)


@torch.no_grad()
def test_what_cannot_be_captured_is_said_and_read_as_before() -> None:
    x, mixer = inputs(), mixer_of("transformer", window=0)

    def step(token: torch.Tensor, states: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        output, state = mixer(token, states[0])
        return output, [state]

    expected, _ = mixer(x, None)
    _, state = mixer(x[:, :10], None)
    decoder, states, outputs = Decoder(step, [mixer], capture=lambda run: run), [state], []
    for token in x[:, 10:18].split(1, 1):
        output, states = decoder(token, states)
        outputs.append(output)
    with pytest.warns(UserWarning, match="without a CUDA graph, and slower for it: the states grow with every token"):
        output, states = decoder(x[:, 18:19], states)
    outputs.append(output)
    for token in x[:, 19:].split(1, 1):
        output, states = decoder(token, states)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), expected[:, 10:], rtol=1e-5, atol=1e-5)

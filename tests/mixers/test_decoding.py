"""States with room: one token after the other in the same shapes, and the same outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

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
        self.calls: list[tuple[Callable[[], Any], Any]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.done.append((str(func), [(x.shape, x.stride(), x.dtype) for x in tensors]))
        self.devices |= {x.device.type for x in tensors}
        output = func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))  # stay where they are
        self.calls.append((partial(func, *args, **kwargs), output))
        return output


def recorded(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA graph without a GPU: what a function did first is done again with the tensors that it was done with."""
    operations, output = Operations(), list[torch.Tensor]()

    def replay() -> torch.Tensor:
        if not output:
            with operations:
                output.append(run())
            return output[0]
        for call, before in operations.calls:
            for now, own in zip(tree_leaves(call()), tree_leaves(before), strict=True):
                if isinstance(own, torch.Tensor) and now.data_ptr() != own.data_ptr():  # else changed, or a view of one
                    own.copy_(now)
        return output[0]

    return replay


def decoder_of(mixer: Any, capture: Callable[..., Any]) -> Decoder:
    """Of a model that is a mixer alone."""

    def step(token: torch.Tensor, states: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        output, state = mixer(token, states[0])
        return output, [state]

    return Decoder(step, nn.ModuleDict({"mixer": mixer}), capture)


@pytest.mark.parametrize("variant", ATTENDING)
@torch.no_grad()
def test_a_decoder_repeats_the_same_operations_on_the_same_tensors(variant: str) -> None:
    """What a graph replays, over three chunks; and what it has captured goes on from other states."""
    x, mixer = inputs(torch.float64), mixer_of(variant, torch.float64, memory_backend="chunked")
    graphs: list[Any] = []
    decoder = decoder_of(mixer, lambda run: graphs.append(run) or recorded(run))
    for tokens in (x, x.flip(1)):
        expected, _ = mixer(tokens, None)
        _, state = mixer(tokens[:, :20], None)
        states = [state]
        for token in range(20, LENGTH):
            output, states = decoder(tokens[:, token : token + 1], states)
            torch.testing.assert_close(output, expected[:, token : token + 1], rtol=0, atol=1e-10)
    assert len(graphs) == 1


@pytest.mark.parametrize("change", ["moved", "replaced"])
@torch.no_grad()
def test_weights_that_are_elsewhere_are_captured_again(change: str) -> None:
    x, mixer = inputs(torch.float64), mixer_of("mag", torch.float64, memory_backend="chunked")
    decoder, last = decoder_of(mixer, recorded), slice(-1, None)
    _, state = mixer(x[:, :20], None)
    states = [state]
    for token in x[:, 20:-1].split(1, 1):
        _, states = decoder(token, states)
    before = [state.map(torch.clone) for state in states]
    for name, parameter in list(mixer.named_parameters()):
        other = 1.5 * parameter
        if change == "moved":
            parameter.data = other
        else:
            owner, _, own = name.rpartition(".")
            setattr(mixer.get_submodule(owner), own, nn.Parameter(other))
    output, _ = decoder(x[:, last], states)
    expected, _ = mixer(x[:, last], before[0])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)


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
    expected, _ = mixer(x, None)
    _, state = mixer(x[:, :10], None)
    decoder, states, outputs = decoder_of(mixer, recorded), [state], []
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

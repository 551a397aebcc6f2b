"""memory_scan on the fused kernels: whole sequences, packed rows and pieces are what the chunked form gives."""

import pytest
import torch

from titans_mcore.memory import MemoryState, PackedRows, Probe, Probed, memory_scan
from titans_mcore.memory.native import why_not_native

from ..matrices import every_pair
from ..memory.streams import Stream, by_channel, make_stream

LENGTH = 40  # two chunks of 16 and an open one


def results(
    stream: Stream,
    rule: str,
    backend: str,
    rows: PackedRows | None,
    pieces: list[int],
    device: str,
    *,
    forgets: bool = True,
) -> list[torch.Tensor]:
    """Reads, end state and gradients of a random functional of them."""
    leaves = [x.detach().float().to(device).requires_grad_() for x in stream.leaves()]
    tokens, depth = leaves[:6], len(stream.weights)
    norm = dict(zip(stream.norm, leaves[6 + depth :], strict=True))
    reads, start = [], 0
    state: MemoryState | None = None
    for length in pieces:
        span = slice(start, start + length)
        part = (
            None if rows is None else PackedRows(*(None if x is None else x[:, span] for x in (rows.starts, rows.real)))
        )
        read, state = memory_scan(
            *(x[:, span] for x in tokens),
            leaves[6 : 6 + depth],
            network=stream.network,
            **norm,
            rule=rule,
            state=state,
            rows=part,
            backend=backend,
            forgets=forgets,
        )
        reads.append(read)
        start += length
    assert state is not None
    outputs = [torch.cat(reads, 1), *state.weights, *state.momentum]
    generator = torch.Generator().manual_seed(1)
    functional = sum((x * torch.randn(x.shape, generator=generator).to(device)).sum() for x in outputs)
    return [x.detach().cpu() for x in (*outputs, *torch.autograd.grad(functional, leaves))]


def packed_rows() -> PackedRows:
    """Documents that begin inside a chunk, and padding."""
    starts, real = torch.zeros(2, LENGTH, dtype=torch.bool), torch.ones(2, LENGTH, dtype=torch.bool)
    starts[0, 5], starts[1, 30], real[1, 8:11] = True, True, False
    return PackedRows(starts, real)


RULES = [("residual_norm", "stable"), ("residual_norm", "literal"), ("plain", "literal")]
CASES = [*((*rule, depth) for rule in RULES for depth in (1, 2)), ("plain", "stable", 1)]


@every_pair(pieces=[[LENGTH], [21, 19]], packed=[False, True], network__rule__depth=CASES)
def test_fused_backend_is_the_chunked_one(
    network: str, rule: str, depth: int, packed: bool, pieces: list[int], device: str
) -> None:
    stream = make_stream(LENGTH, depth, network, width=16, heads=1)
    rows = packed_rows() if packed else None
    fused = results(stream, rule, "fused", rows, pieces, device)
    for ours, theirs in zip(fused, results(stream, rule, "chunked", rows, pieces, device), strict=True):
        assert float((ours - theirs).abs().max()) < 1e-4 * float(1.0 + theirs.abs().max())


def test_large_steps_reach_no_further_than_their_chunk_and_document(device: str) -> None:
    stream = make_stream(LENGTH, 2, width=16, heads=1, theta=1.0)
    stream.alpha = torch.zeros_like(stream.theta)
    fused, chunked = (
        results(stream, "stable", backend, packed_rows(), [21, 19], device, forgets=False)
        for backend in ("fused", "chunked")
    )
    for ours, theirs in zip(fused, chunked, strict=True):
        assert float((ours - theirs).abs().max()) < 1e-4 * float(1.0 + theirs.abs().max())


def test_what_the_kernels_do_not_take_is_said(device: str) -> None:
    for stream, sentence in (
        (by_channel(make_stream(4, 2, width=16)), "not by channel"),
        (make_stream(4, 3, width=16), "1 or 2 matrices"),
        (make_stream(4, 2, width=6), "head width is 6"),
        (make_stream(4, 2, "plain", width=16), "plain networks of several matrices"),
    ):
        tokens = [[a.float() for a in x] if isinstance(x, list) else x.float() for x in stream.tokens]
        with pytest.raises(ValueError, match=f"backend is 'fused'; .*{sentence}"):
            memory_scan(*tokens, [w.float() for w in stream.weights], network=stream.network, backend="fused")


def test_auto_takes_no_kernels_on_a_cpu() -> None:
    stream = make_stream(20, 1, width=16, dtype=torch.float32)
    expected = "chunked" if why_not_native(torch.device("cpu"), channelwise=False, sharded=False) else "native"
    chosen, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    named, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, backend=expected)
    assert torch.equal(chosen, named)


def test_a_probe_on_the_way_of_the_kernels_sees_what_it_sees_on_that_of_the_chunked_form(device: str) -> None:
    stream = make_stream(3 * 16 + 5, 2, width=16, heads=1, dtype=torch.float32)
    seen: dict[str, list[Probed]] = {"fused": [], "chunked": []}
    starts = torch.zeros(2, 3 * 16 + 5, dtype=torch.bool)
    starts[0, 20] = True
    with torch.no_grad():
        for backend, found in seen.items():
            memory_scan(
                *(x.to(device) for x in stream.tokens),
                [w.to(device) for w in stream.weights],
                network=stream.network,
                **{name: x.to(device) for name, x in stream.norm.items()},
                rows=PackedRows(starts.to(device)),
                backend=backend,
                probe=Probe(32, found.append),
            )
    assert len(seen["fused"]) == len(seen["chunked"]) == 2
    for fused, chunked in zip(seen["fused"], seen["chunked"], strict=True):
        torch.testing.assert_close(fused.surprise[fused.real], chunked.surprise[chunked.real], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused.drift, chunked.drift, rtol=1e-4, atol=1e-4)


def test_gates_keep_their_coefficients_alone(device: str) -> None:
    stream = make_stream(4 * 16, 2, width=16, heads=1)
    leaves = [x.detach().float().to(device).requires_grad_() for x in stream.leaves()]
    norm = dict(zip(stream.norm, leaves[8:], strict=True))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        memory_scan(*leaves[:6], leaves[6:8], network="residual_norm", **norm, backend="fused")
    given = {x.untyped_storage().data_ptr() for x in leaves}
    state = 4 * 2 * 2 * 16 * 32  # of the start and of two groups, in two rows each; and M_0, which is half as large
    of_gates = sum(size for place, size in kept.items() if place not in given) - 6.5 * state
    numbers = 2 * (16 + 2 + 2 + 4 / 16) + 1  # of a token and head: G, reads, writes and the chunk's end; a step's mass
    assert of_gates <= 1.01 * 4 * numbers * 2 * 4 * 16

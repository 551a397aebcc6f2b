"""Streams of millions of tokens that try to break the memory: `python -m tests.memory.long_streams --output FILE`.

Every hostile stream under every setting of the gates is a row of one batch. After the stream, each memory has to learn
an ordinary one. The suite runs this on few tokens; a full run takes hours on two CPU cores.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from titans_mcore.memory import MemoryState, memory_scan
from titans_mcore.memory.rule import Rule, initial_weights

WIDTH = 8
STREAMS = ("one token", "alternating", "opposite values", "scaled by 1e4", "bfloat16", "noise")
GATES = {  # theta, eta, alpha
    "open": (1.0, 1.0, 0.0),
    "closed": (0.0, 0.0, 1.0),
    "no forgetting": (0.1, 0.99, 0.0),
    "no momentum": (1.0, 0.0, 0.0),
    "ordinary": (0.01, 0.5, 1e-3),
    "all forgetting": (1.0, 1.0, 1.0),
}
GENTLE = (0.05, 0.5, 2e-3)
PIECE = 16_384


def rows() -> list[tuple[str, str]]:
    """Stream and gates of each row of the batch."""
    return list(itertools.product(STREAMS, GATES))


def pieces(tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values (B, T, 1, D) of all rows, piece by piece; the same tokens whatever the length."""
    generator = torch.Generator().manual_seed(0)
    pair = F.normalize(torch.randn(WIDTH, generator=generator), dim=-1), torch.randn(WIDTH, generator=generator)
    for start in range(0, tokens, PIECE):
        length = min(PIECE, tokens - start)
        sign = torch.ones(length, 1)
        sign[1::2] = -1.0
        noise = F.normalize(torch.randn(length, WIDTH, generator=generator), dim=-1)
        other = torch.randn(length, WIDTH, generator=generator)
        key, value = (x.expand(length, WIDTH) for x in pair)
        both = {
            "one token": (key, value),
            "alternating": (sign * key, value),
            "opposite values": (key, sign * value),
            "scaled by 1e4": (1e4 * noise, 1e4 * other),
            "bfloat16": (noise.bfloat16().float(), other.bfloat16().float()),
            "noise": (noise, other),
        }
        keys, values = (torch.stack([both[stream][i] for stream, _ in rows()]) for i in (0, 1))
        yield keys.unsqueeze(2), values.unsqueeze(2)


def gates(settings: list[tuple[float, float, float]], length: int, depth: int) -> list[Tensor]:
    """theta, eta and alpha (B, T, 1, L)."""
    columns = torch.tensor(settings).T
    return [column.view(-1, 1, 1, 1).expand(-1, length, 1, depth) for column in columns]


def learning_error(network: str, weights: list[Tensor], chunk_size: int, state: MemoryState | None) -> Tensor:
    """Share of its values that an ordinary stream of 3 pairs still misses after 8,192 tokens, by row."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 3, (8_192,), generator=generator)
    keys = F.normalize(torch.randn(3, WIDTH, generator=generator), dim=-1)[index]
    values = torch.randn(3, WIDTH, generator=generator)[index]
    batch = len(rows()) if state is not None else 1
    keys, values = (x.expand(batch, *x.shape).unsqueeze(2) for x in (keys, values))
    gentle = gates([GENTLE] * batch, keys.shape[1], len(weights))
    reads, _ = memory_scan(keys, keys, values, *gentle, weights, network=network, chunk_size=chunk_size, state=state)
    missed = (reads - values)[:, -200:].square().sum((1, 2, 3))
    return missed / values[:, -200:].square().sum((1, 2, 3))


@torch.no_grad()
def run(tokens: int, chunk_size: int, depth: int, network: str) -> dict[str, object]:
    """All rows through their streams, and what they were like then."""
    widths = [WIDTH, *[2 * WIDTH] * (depth - 1), WIDTH]
    normed = network == "residual_norm"
    limit = Rule.of("stable", chunk_size, residual_norm=normed).rms_limit
    weights = initial_weights(1, widths, residual_norm=normed, generator=torch.Generator().manual_seed(0))
    state, largest, finite, started = None, torch.zeros(len(rows())), True, time.perf_counter()
    for keys, values in pieces(tokens):
        settings = gates([GATES[name] for _, name in rows()], keys.shape[1], depth)
        reads, state = memory_scan(
            keys, keys, values, *settings, weights, network=network, chunk_size=chunk_size, state=state
        )
        matrices = [*state.weights, *state.momentum]
        finite &= bool(reads.isfinite().all()) and all(bool(x.isfinite().all()) for x in matrices)
        for x in matrices:
            largest = torch.maximum(largest, x.square().mean((-1, -2)).sqrt()[:, 0])
    assert state is not None
    fresh = float(learning_error(network, weights, chunk_size, None))
    after = learning_error(network, weights, chunk_size, state)
    learned = after < max(0.1, 1.5 * fresh)  # and not by NaN
    worst = int(after.argmax())
    return {
        "tokens": tokens,
        "chunk_size": chunk_size,
        "depth": depth,
        "network": network,
        "finite": finite,
        "largest_rms": round(float(largest.max()), 4),
        "error_of_a_fresh_memory": round(fresh, 4),
        "largest_error_after": round(float(after[worst]), 4),
        "worst": " / ".join(rows()[worst]),
        "rows": len(rows()),
        "rows_that_learn": int(learned.sum()),
        "rows_below_a_tenth": int((after < 0.1).sum()),
        "that_do_not": {" / ".join(rows()[i]): round(float(after[i]), 4) for i in (~learned).nonzero()[:, 0].tolist()},
        "bounded": bool(largest.max() <= 1.001 * limit),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[256, 64, 16])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--networks", nargs="+", default=["residual_norm", "plain"])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a setting, appended")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    for chunk_size, depth, network in itertools.product(arguments.chunk_sizes, arguments.depths, arguments.networks):
        found = run(arguments.tokens, chunk_size, depth, network)
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        print(found, flush=True)


if __name__ == "__main__":
    main()

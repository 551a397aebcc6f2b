"""What stands around a memory's scan, compiled: the same outputs and gradients, by few graphs."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pretrain.config.run_config import RunConfig
from pretrain.config.settings import TrainConfig
from pretrain.engine import build_model
from titans_mcore.config import TitansConfig
from titans_mcore.memory import PackedRows
from titans_mcore.parallel import start, stop

from .test_mixers import LENGTH, inputs, mixer_of


def documents() -> PackedRows:
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, 20] = starts[1, 50] = True
    return PackedRows(starts)


# Compiled without documents, and with some: each function for persistent tokens and for others, for what is of another
# shape, and in MAC for segments that are whole and not.
GRAPHS = {"lmm": (6, 8), "mag": (11, 13), "mac": (18, 27), "transformer": (2, 2)}


@pytest.mark.parametrize("variant", GRAPHS)
def test_compiled_functions_give_the_same(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No function breaks into several graphs; for batches like earlier ones none is compiled."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # tests/conftest.py sets it
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    mixer, compiled = (mixer_of(variant, memory_backend="chunked") for _ in range(2))
    compiled.compile_functions(backend=backend, fullgraph=True)
    counts = []
    for rows in (None, documents(), None, documents()):
        outputs = [each(inputs(), None, rows)[0] for each in (compiled, mixer)]
        torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)
        ours, theirs = (
            torch.autograd.grad(output.square().sum(), list(each.parameters()))
            for output, each in zip(outputs, (compiled, mixer), strict=True)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().max()))
        counts.append(backend.frame_count)
    torch._dynamo.reset()
    assert counts[0] <= GRAPHS[variant][0]
    assert counts[1] <= GRAPHS[variant][1]
    assert counts[2:] == [counts[1]] * 2


@pytest.fixture
def groups() -> Iterator[ProcessGroupCollection]:
    yield start(1, seed=0)
    stop()


def distance(gradients: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Root mean square, over parameters, of the largest difference as a part of the largest value."""
    parts = [(a - b).abs().max() / b.abs().max() for a, b in zip(gradients, exact, strict=True)]
    return float(torch.stack(parts).square().mean().sqrt())


COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"Inductor compiles with {COMPILER}, which is not here; set CXX")
@pytest.mark.parametrize("variant", GRAPHS)
def test_what_a_run_compiles_rounds_no_worse(
    variant: str, groups: ProcessGroupCollection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Losses are equal to 1e-6, and gradients as near to those in float64 as without Inductor.

    They are 1e-6 to 2e-6 of the largest value away from each other, and each of them from float64. The difference is
    made by the formulas of which Inductor composes an operation: torch's own kernels give the same for these.
    """
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    sizes = {"num_layers": 2, "dim": 24, "num_heads": 3, "memory_heads": 2, "memory_expansion": 2, "ffn_dim": 48}
    lengths = {"chunk_size": 8, "persistent_tokens": 5, "segment_length": 16, "window": 12}
    model = TitansConfig(variant, vocab_size=64, memory_backend="chunked", **sizes, **lengths)  # type: ignore[arg-type]
    eager, compiled, exact = (
        build_model(RunConfig(model, train=TrainConfig(compile=compile, precision="fp32")), groups)
        for compile in (False, True, False)
    )
    for copy in (compiled, exact.double()):
        copy.load_state_dict(eager.state_dict())
    errors = []
    for rows in (None, documents().starts):
        for seed in range(4):
            tokens = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(seed))
            losses = [each(tokens, tokens.roll(-1, 1), rows) for each in (eager, compiled, exact)]
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
            *rounded, true = (
                torch.autograd.grad(loss.mean(), list(each.parameters()))
                for loss, each in zip(losses, (eager, compiled, exact), strict=True)
            )
            errors.append([distance(gradients, true) for gradients in rounded])
    torch._dynamo.reset()
    without, by_inductor = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert by_inductor < 1.25 * without, errors
    assert without < 1e-5, errors

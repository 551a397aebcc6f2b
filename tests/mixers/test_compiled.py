"""What stands around a memory's scan, compiled: the same outputs and gradients, by few graphs."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from titans_mcore.memory import PackedRows

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

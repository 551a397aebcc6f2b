"""The native operation is the oracle: outputs, states and every outer gradient, in float64. And how it is built."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.config.run_config import RunConfig
from pretrain.train import memory_form
from titans_mcore.config import TitansConfig
from titans_mcore.memory import MemoryState, memory_scan
from titans_mcore.memory.native import why_not_native
from titans_mcore.memory.rule import Rule
from titans_mcore.native import build, operation

from ..matrices import every_pair
from . import test_packed_rows as packed
from .streams import by_channel, make_stream
from .test_chunk_gradients import gradients, leaving_the_shell
from .test_dual_form import largest_difference, results

needs_library = pytest.mark.skipif(bool(build.why_not_built()), reason=build.why_not_built())
NETWORKS = ("residual_norm", "plain")


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan() -> Iterator[None]:
    """Working memory and results that torch hands out are full of NaN, so that what nothing has written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_library
@every_pair(
    length__chunk_size__width=[(37, 8, 6), (33, 4, 5), (1, 16, 8), (50, 17, 19)],
    depth=[1, 2, 3, 4],
    network=NETWORKS,
    rule=["stable", "literal"],
)
def test_native_equals_the_oracle(
    rule: str, network: str, depth: int, length: int, chunk_size: int, width: int
) -> None:
    stream = make_stream(length, depth, network, width=width, heads=2)
    ours = results(stream, "native", chunk_size, [length], rule)
    assert largest_difference(ours, results(stream, "oracle", chunk_size, [length], rule)) < 1e-10


@needs_library
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_instruction_set_equals_the_oracle(network: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if level > operation.widest():
        pytest.skip("this processor does not have them")
    monkeypatch.setattr(operation, "widest", lambda: level)
    stream = make_stream(45, 2, network, width=11, theta=0.5)
    ours = results(stream, "native", 8, [13, 32])
    assert largest_difference(ours, results(stream, "oracle", 8, [45])) < 1e-10


@needs_library
@every_pair(
    theta=[0.3, 3.0],  # within the shell and on it; for plain networks steps are held
    depth=[1, 2, 3],
    network=NETWORKS,
)
def test_native_equals_the_oracle_however_large_the_step(network: str, depth: int, theta: float) -> None:
    stream = make_stream(37, depth, network, theta=theta)
    assert largest_difference(results(stream, "native", 8, [37]), results(stream, "oracle", 8, [37])) < 1e-10


@needs_library
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_held_steps_of_the_last_matrix_equal_the_oracles_for_both_networks(
    network: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(backend: str, holds_last: bool) -> list[torch.Tensor]:
        rule = Rule(anchored=True, exact=True, holds_last=holds_last, rms_limit=3.0, chunk_size=8)
        monkeypatch.setattr(Rule, "of", lambda *_, **__: rule)
        return results(make_stream(37, depth, network, theta=3.0), backend, 8, [37])

    held = run("native", True)
    assert largest_difference(held, run("oracle", True)) < 1e-10
    assert largest_difference(held, run("oracle", False)) > 1e-3


@needs_library
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_native_equals_the_oracle_where_the_shell_acts(network: str, depth: int) -> None:
    stream = leaving_the_shell(36, network, depth)
    assert largest_difference(results(stream, "native", 4, [36]), results(stream, "oracle", 4, [36])) < 1e-10


@needs_library
def test_clearing_gates_equal_the_oracle() -> None:
    """Gates at their ends: a memory that is cleared, momentum that is dropped or kept whole."""
    stream = make_stream(24, 2, "plain")
    stream.alpha[:, 5], stream.eta[:, 9], stream.eta[:, 14], stream.theta[:, 17] = 1.0, 0.0, 1.0, 0.0
    assert largest_difference(results(stream, "native", 8, [24]), results(stream, "oracle", 8, [24])) < 1e-10


@needs_library
@every_pair(
    theta=[0.05, 2.0], depth=[1, 2], network=NETWORKS, documents__padding=[(True, False), (False, True), (True, True)]
)
def test_native_packed_rows_are_the_oracles_documents_apart(
    documents: bool, padding: bool, network: str, depth: int, theta: float
) -> None:
    stream = make_stream(50, depth, network, theta=theta, heads=2, width=4)
    rows = packed.masks(2, 50, depth, documents=documents, padding=padding)
    ours = packed.results(stream, rows, "native", [50])
    assert largest_difference(ours, packed.results(stream, rows, "oracle", [50])) < 1e-10


@needs_library
@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_reaches_a_carried_state_and_comes_from_the_returned_one(network: str) -> None:
    def run(backend: str) -> list[torch.Tensor]:
        stream = make_stream(21, 2, network)
        generator = torch.Generator().manual_seed(3)
        shapes = [(2, *w.shape) for w in stream.weights] * 2
        carried = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
        leaves = [*stream.leaves()[:6], *carried]
        reads, end = memory_scan(
            *stream.tokens,
            stream.weights,
            **stream.settings,
            chunk_size=8,
            state=MemoryState(carried[:2], carried[2:]),
            backend=backend,
        )
        outputs = [reads, *end.weights, *end.momentum]
        return [*outputs, *torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)]

    assert largest_difference(run("native"), run("oracle")) < 1e-10


@needs_library
@every_pair(
    pieces=[[1] * 20, [5, 3, 2, 10], [9, 1, 10]],
    depth__width=[(1, 6), (2, 16), (3, 6)],
    network=NETWORKS,
    backends=[("native",), ("native", "chunked")],  # in turn: their states are one
    theta=[0.5, 5.0],
)
@torch.no_grad()
def test_decoding_equals_the_oracle(
    theta: float, backends: tuple[str, ...], network: str, depth: int, width: int, pieces: list[int]
) -> None:
    stream = make_stream(20, depth, network, width=width, theta=theta)
    reads, state, start = [], None, 0
    for length, backend in zip(pieces, itertools.cycle(backends), strict=False):
        piece = stream.piece(start, start + length)
        read, state = memory_scan(
            *piece.tokens, stream.weights, **stream.settings, chunk_size=8, state=state, backend=backend
        )
        reads.append(read)
        start += length
    whole, end = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8, backend="oracle")
    ours = [torch.cat(reads, 1), *state.weights, *state.momentum]
    assert largest_difference(ours, [whole, *end.weights, *end.momentum]) < 1e-10


@needs_library
@pytest.mark.parametrize("network", NETWORKS)
def test_float32_is_float64_within_rounding(network: str) -> None:
    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        def functional(reads: torch.Tensor, state: MemoryState) -> torch.Tensor:
            return sum((x.sin().sum() for x in (reads, *state.weights, *state.momentum)), reads.new_zeros(()))

        stream = make_stream(100, 2, network, dtype=dtype, width=20)
        return [x.double() for x in gradients(functional, stream, "native", chunk_size=16)]

    assert largest_difference(run(torch.float32), run(torch.float64)) < 1e-4


@needs_library
def test_half_precision_tokens_are_computed_in_float32() -> None:
    stream = make_stream(40, 2, dtype=torch.bfloat16)
    reads, state = memory_scan(*stream.tokens, stream.weights, **stream.settings, backend="native")
    wide = make_stream(40, 2, dtype=torch.bfloat16)
    wide.queries, wide.keys, wide.values = (x.float() for x in wide.tokens[:3])
    same, end = memory_scan(*wide.tokens, wide.weights, **wide.settings, backend="native")
    assert torch.equal(reads, same.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(state.weights, end.weights, strict=True))


@needs_library
def test_any_number_of_threads_gives_the_same_bits() -> None:
    stream, threads = make_stream(64, 2, dtype=torch.float32), torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(stream, "native", 8, [64]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_library
def test_a_key_of_zeros_leaves_every_gradient_finite() -> None:
    for network, depth in itertools.product(NETWORKS, (1, 2)):
        stream = make_stream(8, depth, network, dtype=torch.float32)
        stream.keys[:, 0] = 0.0
        assert all(bool(x.isfinite().all()) for x in results(stream, "native", 8, [8]))


@needs_library
def test_operator_keeps_the_rules_of_torch() -> None:
    """Schema, fake tensors and autograd's registration."""
    stream = make_stream(32, 2, width=8)
    state = [w.expand(2, *w.shape).contiguous() for w in stream.weights]
    leaves = [x.detach().requires_grad_() for x in (*stream.tokens, *stream.norm.values())]
    widths = [8, *(w.shape[-1] for w in stream.weights)]
    setting = operation.Setting(widths, 8, 2, True, True, True, False, 3.0, 8, 1e-6, 1e-6)
    momentum = [torch.zeros_like(w) for w in state]
    arguments = (*leaves, stream.weights, state, momentum, [], [], None, None, *setting, True)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.titans_mcore.memory_scan, arguments, test_utils=utilities)


@needs_library
def test_a_second_derivative_is_refused() -> None:
    stream = make_stream(16, 2)
    leaves = stream.leaves()
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, chunk_size=8, backend="native")
    first = torch.autograd.grad(reads.square().sum(), leaves[:3], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()


@needs_library
def test_a_state_that_does_not_fit_is_named() -> None:
    stream, other = make_stream(16, 2), make_stream(16, 2, width=8)
    settings = {**stream.settings, "chunk_size": 8, "backend": "native"}
    _, state = memory_scan(*other.tokens, other.weights, network="residual_norm", chunk_size=8)
    with pytest.raises(ValueError, match="matrix 0 of the memory's state has shape"):
        memory_scan(*stream.tokens, stream.weights, **settings, state=state)
    _, state = memory_scan(*stream.tokens, stream.weights, **settings)
    with pytest.raises(ValueError, match=r"computes in torch\.float64, and its state holds torch\.float32"):
        memory_scan(*stream.tokens, stream.weights, **settings, state=state.to(torch.float32))


def test_what_native_does_not_cover_is_named_and_computed_otherwise() -> None:
    stream = by_channel(make_stream(20, 2))
    with pytest.raises(ValueError, match="backend is 'native'; the native memory forgets by head"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings, backend="native")
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    chunked, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, backend="chunked")
    assert torch.equal(reads, chunked)
    assert "not parts of them" in why_not_native(torch.device("cpu"), channelwise=False, sharded=True)
    assert "is for the CPU" in why_not_native(torch.device("cuda"), channelwise=False, sharded=False)


@needs_library
def test_an_installed_operation_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which an exported folder, with its own copy of the rule, may find."""
    monkeypatch.setattr("titans_mcore.native.VERSION", -1)
    stream = make_stream(20, 2, "residual_norm")
    with pytest.raises(ValueError, match="another version's"):
        results(stream, "native", 8, [20])
    found, chunked = (results(stream, backend, 8, [20]) for backend in ("auto", "chunked"))
    assert all(torch.equal(a, b) for a, b in zip(found, chunked, strict=True))


@needs_library
def test_start_of_a_run_says_how_its_memory_is_computed() -> None:
    def said(**model: Any) -> str:
        return memory_form(RunConfig(model=TitansConfig(**model)), torch.device("cpu"))

    assert said() == "native"
    assert said(memory_backend="oracle") == "oracle"
    assert said(memory_alpha="channel").startswith("chunked, which is slower; the native memory forgets by head")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for libraries, in which this process has not looked yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "libraries"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    for cached in (build.why_not_built, build.library):
        cached.cache_clear()
    yield tmp_path / "libraries"
    for cached in (build.why_not_built, build.library):
        cached.cache_clear()


def script(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


def test_without_a_compiler_the_memory_computes_as_before(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(elsewhere / "nothing"))
    stream = make_stream(20, 2)
    reads, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings)
    chunked, _ = memory_scan(*stream.tokens, stream.weights, **stream.settings, backend="chunked")
    assert torch.equal(reads, chunked)
    with pytest.raises(ValueError, match="backend is 'native'; the native memory needs a C"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings, backend="native")


def test_a_switch_does_without(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.why_not_built() == "the native memory is switched off by TITANS_NATIVE=0"
    assert not elsewhere.exists()


def test_a_compiler_that_fails_is_quoted_once(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = 'echo "memory.cpp:1: no such thing" >&2; exit 1'
    monkeypatch.setenv(
        "CXX", script(tmp_path / "compiler", f'case "$*" in *memory.cpp*) {failing};; esac; exec c++ "$@"')
    )
    stream = make_stream(20, 1)
    with pytest.warns(UserWarning, match=r"memory: the native memory could not be compiled(.|\n)*no such thing"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings)
    with warnings.catch_warnings(action="error"):
        memory_scan(*stream.tokens, stream.weights, **stream.settings)
    assert build.why_not_built() == "the native memory could not be compiled"
    assert not list(elsewhere.glob("*.so"))


TINY = 'extern "C" int answer() { return 42; }'
BUILD = (
    "import sys; from pathlib import Path; from titans_mcore.native.build import built; built(*map(Path, sys.argv[1:]))"
)


def builder(library: Path, source: Path, **environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", BUILD, str(library), str(source)]
    return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)


def test_ninja_is_found_beside_an_interpreter_whose_environment_is_not_active(tmp_path: Path) -> None:
    source, library, tools = tmp_path / "tiny.cpp", tmp_path / "tiny.so", tmp_path / "bin"
    source.write_text(TINY)
    tools.mkdir()
    for tool in ("c++", "as", "ld", "sh"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    assert builder(library, source, PATH=str(tools)).wait() == 0
    assert library.is_file()


def test_one_of_several_processes_builds_and_one_that_is_killed_stops_nobody(tmp_path: Path) -> None:
    source, library, log = tmp_path / "tiny.cpp", tmp_path / "libraries" / "tiny.so", tmp_path / "log"
    source.write_text(TINY)
    stuck = builder(library, source, CXX=script(tmp_path / "stuck", f"echo begun >>{log}; sleep 600"))
    while not (log.exists() and "begun" in log.read_text()):
        assert stuck.poll() is None
        time.sleep(0.05)
    counting = script(tmp_path / "counting", f'case "$*" in *tiny.cpp*) echo compiled >>{log};; esac; exec c++ "$@"')
    others = [builder(library, source, CXX=counting) for _ in range(2)]
    os.killpg(stuck.pid, signal.SIGKILL)
    stuck.wait()
    assert [process.wait(timeout=120) for process in others] == [0, 0]
    assert log.read_text().count("compiled") == 1
    assert sorted(x.name for x in library.parent.iterdir()) == ["tiny.lock", "tiny.so"]


SANITIZED = """
import torch
from tests.memory import test_packed_rows as packed
from tests.memory.streams import make_stream
from tests.memory.test_dual_form import results
from titans_mcore.memory import memory_scan

for rule, network, depth, width in (
    ("stable", "plain", 3, 7),
    ("stable", "residual_norm", 2, 5),
    ("literal", "plain", 1, 16),
):
    stream = make_stream(29, depth, network, width=width, theta=0.5, batch=1, heads=2)
    results(stream, "native", 5, [13, 16], rule)
    stream, state = make_stream(50, depth, network, width=width, heads=2), None
    packed.results(stream, packed.masks(2, 50, 1), "native", [50])
    with torch.no_grad():
        for t in range(12):
            one = stream.piece(t, t + 1)
            settings = {**stream.settings, "chunk_size": 5, "rule": rule, "backend": "native"}
            _, state = memory_scan(*one.tokens, stream.weights, **settings, state=state)
print("clean")
"""


@pytest.mark.slow
@needs_library
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    """Addresses and undefined behaviour, in an unoptimised build that this test makes."""
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi -fopenmp"
    program = f"""
from titans_mcore.native import build
build.FLAGS = tuple("{flags}".split())
{SANITIZED}"""
    asan = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": asan.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "LDFLAGS": "-fsanitize=address,undefined",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "clean" in done.stdout, done.stderr[-3_000:]

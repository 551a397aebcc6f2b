"""What is measured: one frozen value a case, and the lists of cases that are run together.

Letters: B batch, T time, H heads, D head width, L memory layers, b tokens of a chunk.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from evals.efficiency import SECTIONS, MemorySettings

OURS, TITANS_PYTORCH = "titans-mcore", "titans-pytorch"
FORWARD, BOTH = "forward", "forward+backward"
GENTLE = 1e-3  # steps so small that no bound of the memory acts, which spares it work
_ORACLE_LENGTH = 256  # tokens; the literal loop is a reference, not a contender


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        section: The list it belongs to; cases of one section and length take turns.
        implementation: Whose code.
        part: "layer" is the memory with everything a model needs around it (projections, gates, norms), "scan" the
            memory alone on given queries, keys, values and gates; for other operators their name.
        setting: What distinguishes it among cases of the same implementation and part: this project's backend, the
            arguments of others.
        direction: "forward" (no gradients are wanted) or "forward+backward" (of inputs and parameters).
        batch: B.
        length: T.
        heads: H.
        width: D.
        depth: L.
        expansion: Hidden width over D.
        chunk: b, tokens whose gradients are taken at the same weights; 0 means all of the sequence.
        gates: Tokens that share one value of each gate.
        steps: Factor on the theta and alpha that a scan is given; 1 is about where a new layer's stand.
        dtype: Of inputs and parameters.
        device: "cpu" or "cuda".
    """

    section: str
    implementation: str
    part: str
    setting: str
    direction: str
    batch: int
    length: int
    heads: int
    width: int
    depth: int
    expansion: int
    chunk: int
    gates: int
    steps: float
    dtype: str
    device: str

    @property
    def name(self) -> str:
        """How the case is called in reports and in --only."""
        return f"{self.section} {self.label} T={self.length} {self.direction}"

    @property
    def label(self) -> str:
        """What is measured, without its size."""
        return f"{self.implementation} {self.part} {self.setting}{' gentle' if self.steps == GENTLE else ''}"

    @property
    def tokens(self) -> int:
        """Tokens of one repeat."""
        return self.batch * self.length

    def to_dict(self) -> dict[str, Any]:
        """The case as plain values."""
        return {"name": self.name, "label": self.label, **asdict(self)}


def plan(settings: MemorySettings, device: str) -> list[list[Case]]:
    """The cases of a run, in groups whose repeats take turns, so that noise of the machine hits them alike.

    Args:
        settings: What is asked for; `quick` makes the shapes tiny.
        device: "cpu" or "cuda".
    """
    base = _base(settings, device)
    lengths, growth = sorted(set(settings.lengths)), sorted(set(settings.growth_lengths))
    if settings.quick:
        lengths, growth = [4 * settings.chunk_size], [4 * settings.chunk_size, 8 * settings.chunk_size]
    groups = [[replace(case, length=length) for case in _side_by_side(base, length)] for length in lengths]
    layer = replace(base, section="growth", direction=BOTH)
    groups.append([replace(layer, length=length) for length in growth])
    if device == "cuda":
        groups += [[replace(case, length=length) for case in _operators(base)] for length in lengths]

    def wanted(case: Case) -> bool:
        words = settings.only
        return not words or any(word == case.section if word in SECTIONS else word in case.name for word in words)

    return [group for group in ([case for case in group if wanted(case)] for group in groups) if group]


def _base(settings: MemorySettings, device: str) -> Case:
    gpu = device == "cuda"
    shape = (settings.batch or (4 if gpu else 1), settings.heads or (24 if gpu else 4), settings.width)
    expansion = settings.expansion or (4 if gpu else 2)
    if settings.quick:
        shape, expansion = (1, 2, 8), 2
    batch, heads, width = shape
    return Case(
        section=SECTIONS[0],
        implementation=OURS,
        part="layer",
        setting="auto",
        direction=FORWARD,
        batch=batch,
        length=0,
        heads=heads,
        width=width,
        depth=settings.depth,
        expansion=expansion,
        chunk=settings.chunk_size,
        gates=1,
        steps=1.0,
        dtype="bfloat16" if gpu else "float32",
        device=device,
    )


def _side_by_side(base: Case, length: int) -> Iterator[Case]:
    """This project's backends, and titans-pytorch's settings: gates per token or chunk, gradients frozen or not."""
    for direction in (FORWARD, BOTH):
        case = replace(base, direction=direction)
        yield case
        yield replace(case, part="scan", setting="auto")
        yield replace(case, part="scan", setting="auto", steps=GENTLE)
        yield replace(case, part="scan", setting="chunked")
        if base.device == "cpu":
            yield replace(case, setting="chunked")
            yield replace(case, part="scan", setting="native")
        if length <= _ORACLE_LENGTH:
            yield replace(case, part="scan", setting="oracle")
        theirs = replace(case, implementation=TITANS_PYTORCH)
        for gates in (1, base.chunk):
            for chunk in (base.chunk, 0):
                setting = f"chunk_size={gates} batch_size={chunk or None}"
                yield replace(theirs, setting=setting, gates=gates, chunk=chunk)


def _operators(base: Case) -> Iterator[Case]:
    """Other operators on queries, keys and values of the same shape; GPU only."""
    for direction in (FORWARD, BOTH):
        case = replace(base, section="gpu", direction=direction)
        yield replace(case, part="scan", setting="auto")
        linear = replace(case, depth=1, expansion=1)
        yield replace(linear, implementation="flash-linear-attention", part="chunk_ttt_linear", setting="default")
        yield replace(linear, implementation="flash-linear-attention", part="chunk_gated_delta_rule", setting="default")
        yield replace(linear, implementation="flash-attn", part="flash_attn_func", setting="causal", chunk=0)

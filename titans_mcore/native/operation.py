"""The torch operators `titans_mcore::memory_scan` and `memory_scan_backward`, and the way to memory.cpp.

Queries, keys and values are (B, C b, H, D), gates (B, C b, H, L), states and M_0 lists over the L matrices. The
operators take channels in whole lines of the cache; `scan` and `go_on` pad those that are not.
"""

import ctypes
import itertools
import struct
from collections.abc import Sequence
from ctypes import c_bool, c_char_p, c_int64, c_void_p
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .build import library

_LINE = 64  # bytes; working memory begins with a line of the cache

# `Problem` in memory.cpp: its fields in their order and how many words of 8 bytes each has.
_FIELDS = {
    **dict.fromkeys(("rows", "heads", "chunks", "size", "group", "depth"), 1),
    **dict.fromkeys(("width", "padded"), 5),
    **dict.fromkeys(("norm", "anchored", "exact", "holds_last", "closed", "old"), 1),
    **dict.fromkeys(("rms_limit", "lower_steps", "smallest_decay", "epsilon"), 1),
    **dict.fromkeys(("queries", "keys", "values", "theta", "eta", "alpha", "scale", "shift"), 1),
    **dict.fromkeys(("anchors", "weights", "momentum", "fresh_weights", "fresh_momentum"), 4),
    **dict.fromkeys(("counts", "restarts"), 1),
    **dict.fromkeys(("old_inputs", "old_deltas"), 4),
    **dict.fromkeys(("old_steps", "reads"), 1),
    **dict.fromkeys(("weights_after", "momentum_after"), 4),
    "kept": 1,
    **dict.fromkeys(("inputs", "deltas"), 4),
    "steps": 1,
    **dict.fromkeys(("of_reads", "of_queries", "of_keys", "of_values", "of_theta", "of_eta", "of_alpha"), 1),
    **dict.fromkeys(("of_scale", "of_shift"), 1),
    **dict.fromkeys(("of_anchors", "of_weights", "of_momentum", "of_fresh_weights", "of_fresh_momentum"), 4),
}
_PLACES = dict(zip(_FIELDS, itertools.accumulate(_FIELDS.values(), initial=0), strict=False))
_WORDS = sum(_FIELDS.values())


class Setting(NamedTuple):
    """What is no tensor: see memory.rule.Rule and memory.layout.Chunks.

    Attributes:
        widths: d_in of each matrix, then D.
        size: Slots b of a chunk.
        group: Chunks between two states that are kept.
        closed: Whether a chunk that is full has ended.
        norm: Whether the network is residual_norm.
        exact: The rule's.
        holds_last: The rule's.
        rms_limit: The rule's.
        lower_steps: See Rule.lower_steps.
        smallest_decay: Least 1 - eta of a step's mass.
        epsilon: LayerNorm's.
    """

    widths: list[int]
    size: int
    group: int
    closed: bool
    norm: bool
    exact: bool
    holds_last: bool
    rms_limit: float
    lower_steps: float
    smallest_decay: float
    epsilon: float


_ARGUMENTS = (
    "Tensor queries, Tensor keys, Tensor values, Tensor theta, Tensor eta, Tensor alpha, Tensor? scale, Tensor? shift,"
    " Tensor[] anchors, Tensor[] weights, Tensor[] momentum, Tensor[] fresh_weights, Tensor[] fresh_momentum,"
    " Tensor? counts, Tensor? restarts, int[] widths, int size, int group, bool closed, bool norm, bool exact,"
    " bool holds_last, float rms_limit, float lower_steps, float smallest_decay, float epsilon"
)
_TENSORS = 15  # arguments in front of the settings
_NAMES = ("queries", "keys", "values", "theta", "eta", "alpha", "scale", "shift")
_LISTS = ("anchors", "weights", "momentum", "fresh_weights", "fresh_momentum")


class _Call:
    """One call of the library.

    Args:
        tensors: The first _TENSORS arguments of an operator.
        setting: The others.
        old: Tokens of an open chunk that are worked out already.
    """

    def __init__(self, tensors: Sequence[Any], setting: Setting, old: int = 0) -> None:
        queries = tensors[0]
        batch, slots, heads, _ = queries.shape
        self.like, self.held = queries, list[Tensor]()
        widths, size, group, closed, norm, exact, holds_last, *rest = setting
        # A list of words, not a ctypes.Structure, which takes longer to fill than a token to compute.
        self.memories, padding = batch * heads, [0] * (5 - len(widths))
        line = _LINE // queries.element_size()
        self.words = [batch, heads, slots // size, size, group, len(widths) - 1]
        self.words += [*widths, *padding, *(-(-w // line) * line for w in widths), *padding]
        self.words += [int(norm), int(bool(tensors[8])), int(exact), int(holds_last), int(closed), old]
        self.words += struct.unpack("4q", struct.pack("4d", *rest))
        self.words += [0] * (_WORDS - len(self.words))
        for name, value in zip((*_NAMES, *_LISTS, "counts", "restarts"), tensors, strict=True):
            self.set(name, value)

    def set(self, name: str, value: Any) -> None:
        """Sets a field to where a tensor lies, or some; None and an empty list are null."""
        place = _PLACES[name]
        if isinstance(value, Tensor):
            self.words[place] = self._pointer(value)
        elif value:
            self.words[place : place + len(value)] = [self._pointer(x) for x in value]

    def run(self, *, back: bool = False) -> None:
        """Runs it, forward or back."""
        code, level = _code(), widest()
        bits, problem = self.like.element_size() * 8, struct.pack(f"{_WORDS}q", *self.words)
        size = code.memory_workspace(problem, back, level, bits)
        threads = min(torch.get_num_threads(), self.memories)
        workspace = self.like.new_empty((threads * size + _LINE) // self.like.element_size())
        first = -(-workspace.data_ptr() // _LINE) * _LINE
        code.memory_run(problem, back, level, bits, self.memories, first, size)

    def _pointer(self, x: Tensor) -> int:
        if x.dtype != self.like.dtype and x.is_floating_point():
            raise ValueError(
                f"the memory computes in {self.like.dtype}, and its state holds {x.dtype}; make them equal"
            )
        if not x.is_contiguous():
            x = x.contiguous()
            self.held.append(x)  # lives as long as the call
        return x.data_ptr()


@cache
def widest() -> int:
    """The widest instructions that this processor has: 0 those of any, 1 AVX2, 2 AVX-512."""
    return {"AVX2": 1, "AVX512": 2}.get(torch.backends.cpu.get_cpu_capability(), 0)


@cache
def _code() -> ctypes.CDLL:
    """The library, its functions declared."""
    code = library()
    integer = ctypes.c_int
    code.memory_workspace.restype, code.memory_run.restype = c_int64, None
    code.memory_workspace.argtypes = [c_char_p, c_bool, integer, integer]
    code.memory_run.argtypes = [c_char_p, c_bool, integer, integer, c_int64, c_void_p, c_int64]
    assert code.memory_problem_bytes() == 8 * _WORDS
    return code


def _unwritten(like: Tensor, counts: Tensor | None) -> Tensor:
    """For what is written where there are tokens; zeros where some slots may be empty."""
    make = torch.empty_like if counts is None else torch.zeros_like
    return make(like, memory_format=torch.contiguous_format)


def _scan(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    call = _Call(arguments[:_TENSORS], Setting(*arguments[_TENSORS:-1]))
    results = _results(*arguments)
    names = ("reads", "weights_after", "momentum_after", *(["kept"] if results[3].numel() else []))
    for name, x in zip(names, results, strict=False):
        call.set(name, x)
    call.run()
    return results


def _results(*arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """A scan's results, unwritten: reads, weights, momentum, and what is kept of the states."""
    queries, weights, counts, keep = arguments[0], arguments[9], arguments[13], arguments[-1]
    setting = Setting(*arguments[_TENSORS:-1])
    weights_after, momentum_after = ([x.new_empty(x.shape) for x in weights] for _ in range(2))
    batch, slots, heads, _ = queries.shape
    groups = -(-(slots // setting.size) // setting.group)
    size = sum(2 * w.shape[-2] * w.shape[-1] for w in weights)
    kept = queries.new_empty(groups - 1 if keep else 0, batch * heads, size)
    return _unwritten(queries, counts), weights_after, momentum_after, kept


def _scan_backward(of_reads: Tensor, *arguments: Any) -> list[Tensor]:
    of_weights, of_momentum, kept, *tensors = arguments[: 3 + _TENSORS]
    call = _Call(tensors, Setting(*arguments[3 + _TENSORS :]))
    batch, _, heads, width = tensors[0].shape
    tokens = [_unwritten(x, tensors[13]) for x in tensors[:6]]
    norm = [of_reads.new_zeros(batch, heads, width) for _ in tensors[6:8]]
    anchors = [x.new_zeros(batch, *x.shape) for x in tensors[8]]
    states = [[x.clone(memory_format=torch.contiguous_format) for x in xs] for xs in (of_weights, of_momentum)]
    fresh = [[x.new_zeros(x.shape) for x in xs] for xs in tensors[11:13]]
    for name, value in zip((*_NAMES, *_LISTS), (*tokens, *norm, anchors, *states, *fresh), strict=True):
        call.set(f"of_{name}", value)
    call.set("of_reads", of_reads)
    if kept.numel():
        call.set("kept", kept)
    call.run(back=True)
    there = [x for x, parameter in zip(norm, tensors[6:8], strict=True) if parameter is not None]
    return [*tokens, *(x.sum(0) for x in (*there, *anchors)), *states[0], *states[1], *fresh[0], *fresh[1]]


def _gradients(of_reads: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients at all tensors but the masks, unwritten."""
    _, _, _, *tensors = arguments[: 3 + 13]
    flat = [*tensors[:8], *(x for xs in tensors[8:] for x in xs)]
    return [x.new_empty(x.shape) for x in flat if x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    tensors = inputs[:_TENSORS]
    ctx.setting = inputs[_TENSORS:-1]
    ctx.lengths = [len(x) if isinstance(x, list | tuple) else None for x in tensors]
    flat = [y for x, n in zip(tensors, ctx.lengths, strict=True) for y in ([x] if n is None else x)]
    ctx.save_for_backward(*flat, output[3])


def _back(ctx: Any, of_reads: Tensor, of_weights: list[Tensor], of_momentum: list[Tensor], _: Any) -> tuple[Any, ...]:
    *flat, kept = ctx.saved_tensors
    left = iter(flat)
    tensors = [next(left) if n is None else [next(left) for _ in range(n)] for n in ctx.lengths]
    backward = torch.ops.titans_mcore.memory_scan_backward
    found = iter(backward(of_reads, of_weights, of_momentum, kept, *tensors, *ctx.setting))
    gradients = [
        [next(found) for _ in x] if isinstance(x, list) else None if x is None else next(found) for x in tensors[:13]
    ]
    return (*gradients, None, None, *(None for _ in ctx.setting), None)


def _no_second_derivative(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("the native memory is once_differentiable; use memory backend 'oracle' for further derivatives")


def _go_on(*arguments: Any) -> tuple[Any, ...]:
    inputs, deltas, steps, _ = arguments[-4:]
    call = _Call(arguments[:_TENSORS], Setting(*arguments[_TENSORS:-4]), steps.shape[1])
    results = _results_of_going_on(*arguments)
    for name, x in zip(("old_inputs", "old_deltas", "old_steps"), (inputs, deltas, steps), strict=True):
        call.set(name, x)
    for name, x in zip(("reads", "inputs", "deltas", "steps", "weights_after", "momentum_after"), results, strict=True):
        call.set(name, x)
    call.run()
    return results


def _results_of_going_on(*arguments: Any) -> tuple[Any, ...]:
    """What _go_on gives, unwritten."""
    queries, theta, weights, steps, ends = (arguments[i] for i in (0, 3, 9, -2, -1))
    batch, together, heads, width = queries.shape
    inputs = [x.new_empty(batch, heads, together, x.shape[-2]) for x in weights]
    deltas = [x.new_empty(batch, heads, together, x.shape[-1]) for x in weights]
    after = [[x.new_empty(x.shape) for x in weights] if ends else [] for _ in range(2)]
    reads = queries.new_empty(batch, together - steps.shape[1], heads, width)
    return reads, inputs, deltas, theta.new_empty(theta.shape), *after


_SCAN, _BACK, _GOING_ON = (f"titans_mcore::memory_{name}" for name in ("scan", "scan_backward", "go_on"))
_OPERATORS = torch.library.Library("titans_mcore", "DEF")
_OPERATORS.define(f"memory_scan({_ARGUMENTS}, bool keep) -> (Tensor, Tensor[], Tensor[], Tensor)")
_OPERATORS.define(
    f"memory_scan_backward(Tensor of_reads, Tensor[] of_weights, Tensor[] of_momentum, Tensor kept, {_ARGUMENTS})"
    " -> Tensor[]"
)
_OPERATORS.define(
    f"memory_go_on({_ARGUMENTS}, Tensor[] inputs, Tensor[] deltas, Tensor steps, bool ends)"
    " -> (Tensor, Tensor[], Tensor[], Tensor, Tensor[], Tensor[])"
)
for _name, _work, _fake in (
    (_SCAN, _scan, _results),
    (_BACK, _scan_backward, _gradients),
    (_GOING_ON, _go_on, _results_of_going_on),
):
    _OPERATORS.impl(_name.partition("::")[2], _work, "CPU")
    torch.library.register_fake(_name, _fake, lib=_OPERATORS)
torch.library.register_autograd(_SCAN, _back, setup_context=_save, lib=_OPERATORS)
torch.library.register_autograd(_BACK, _no_second_derivative, lib=_OPERATORS)


def _in_lines(tensors: Sequence[Any], widths: list[int]) -> Sequence[Any]:
    """Arguments of an operator, their channels padded with zeros to whole lines of the cache."""
    batch, _, heads, _ = tensors[0].shape
    for matrices in tensors[9:13]:
        for i, x in enumerate(matrices):
            if x.shape != (batch, heads, widths[i], widths[i + 1]):
                raise ValueError(f"matrix {i} of the memory's state has shape {tuple(x.shape)}, which does not fit")
    line = _LINE // tensors[0].element_size()
    if not any(w % line for w in widths):
        return tensors
    rows = [None if x is None else _to_line(x, line) for x in (*tensors[:3], *tensors[6:8])]
    lists = [[F.pad(_to_line(x, line), (0, 0, 0, -x.shape[-2] % line)) for x in xs] for xs in tensors[8:13]]
    return *rows[:3], *tensors[3:6], *rows[3:], *lists, *tensors[13:]


def _to_line(x: Tensor, line: int) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % line))


def _cut(matrices: list[Tensor], widths: list[int]) -> list[Tensor]:
    return [x[..., : widths[i], : widths[i + 1]] for i, x in enumerate(matrices)]


def scan(tensors: Sequence[Any], setting: Setting) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Reads (B, C b, H, D), and weights and momentum after the last chunk, L of (B, H, d_in, d_out).

    Args:
        tensors: Queries, keys, values, theta, eta, alpha, scale and shift of the LayerNorm (H, D) or None, M_0 as L of
            (H, d_in, d_out) or empty where forgetting does not lead to it, weights and momentum before the first chunk,
            and those in which documents begin, L of (B, H, d_in, d_out) or empty; counts and restarts (C, B) or None.
        setting: The rest.
    """
    widths, given = setting.widths, _in_lines(tensors, setting.widths)
    flat = (y for x in tensors if x is not None for y in (x if isinstance(x, list) else [x]))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in flat)
    reads, weights, momentum, _ = torch.ops.titans_mcore.memory_scan(*given, *setting, keep)
    if given is tensors:
        return reads, weights, momentum
    return reads[..., : widths[-1]], _cut(weights, widths), _cut(momentum, widths)


def go_on(
    tensors: Sequence[Any], setting: Setting, inputs: list[Tensor], deltas: list[Tensor], steps: Tensor, ends: bool
) -> tuple[Any, ...]:
    """Some tokens that go on in an open chunk; not to be differentiated.

    Args:
        tensors: As for scan: all tokens of the chunk, and the state that it began with.
        setting: As for scan; the chunk is of all these tokens.
        inputs: Of the first of them what OpenChunk holds, like deltas and steps.
        deltas: See inputs.
        steps: See inputs.
        ends: Whether the state after the last token is wanted.

    Returns:
        What the new tokens read; inputs, deltas and steps of all tokens; weights and momentum, or empty lists.
    """
    widths, line, given = setting.widths, _LINE // steps.element_size(), _in_lines(tensors, setting.widths)
    if given is not tensors:
        inputs, deltas = ([_to_line(x, line) for x in xs] for xs in (inputs, deltas))
    arguments = (*given, *setting, inputs, deltas, steps, ends)
    if type(tensors[0]) is Tensor and not torch.compiler.is_compiling():
        with torch.no_grad():
            results = _go_on(*arguments)  # the dispatcher would cost as much as the work
    else:
        results = torch.ops.titans_mcore.memory_go_on(*arguments)
    if given is tensors:
        return results
    reads, inputs, deltas, steps, *after = results
    inputs = [x[..., :w] for x, w in zip(inputs, widths[:-1], strict=True)]
    deltas = [x[..., :w] for x, w in zip(deltas, widths[1:], strict=True)]
    weights, momentum = (_cut(x, widths) for x in after)
    return reads[..., : widths[-1]], inputs, deltas, steps, weights, momentum

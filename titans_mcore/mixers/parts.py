"""What a mixer is made of, asked for by shape, so that one mixer serves one process, many ranks and the exported model.

A mixer knows heads and widths; how a matrix is stored, split over ranks or initialised is the maker's business.
Inputs and outputs are (B, T, E); B, T, H, D, L and N as in config.py.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..config import TitansConfig
from ..memory import WHOLE, PackedRows
from ..memory.checkpoint import autocast_is_on
from ..memory.layout import take


class MemoryParts:
    """Makes the parameters of the memory, whose heads ranks share in a way of their own: here whole, of one process.

    Attributes:
        heads: Heads that this process computes: its own, or all H when each rank holds a part of every head's matrices.
        shard: What the process holds of the matrices.
    """

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.shard = WHOLE

    def column(self, d_in: int, *per_head: int) -> nn.Module:
        """Linear map (..., d_in) to (..., heads * sum(per_head)); its input is in the tp region.

        Head by head, and in a head one thing behind the other, each so wide: query, key, value, gates.
        """
        return Linear(d_in, self.heads * sum(per_head))

    def per_head(self, full: Tensor) -> nn.Parameter:
        """A parameter whose first axis is heads, from its value for all H heads; who trains says whether it decays."""
        return nn.Parameter(full.clone())

    def matrix(self, full: Tensor, layer: int, depth: int) -> nn.Parameter:
        """Initial weights of matrix `layer` of `depth`, from (H, d_in, d_out) for all heads."""
        return self.per_head(full)

    def merge_heads(self, x: Tensor) -> Tensor:
        """What the heads give, (B, T, heads, F), as input of row(), (B, T, F'): this process's channels of H F."""
        return x.flatten(2)


class Parts(MemoryParts):
    """Makes parameters: whole ones here, of one process, or a rank's share. Its own heads are the attention's.

    A block holds x as (B, T', E): all tokens, or this rank's when sequence parallelism divides them. Inside a mixer
    they are whole. In Megatron-core's words the sp region is sequence parallel, the tp region tensor parallel: what is
    in the latter has passed gather_from_sp_region() or copy_to_tp_region().

    Args:
        config: The model's settings.

    Attributes:
        memory: Makes the memory's.
    """

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config.num_heads)
        self.memory = MemoryParts(config.memory_shape.heads)

    def with_heads(self, heads: int) -> Self:
        """The same for a mixer that has so many heads of its own, over all ranks."""
        parts = copy.copy(self)
        parts.heads = heads
        return parts

    def row(self, d_in: int, d_out: int, *, residual: bool = True) -> nn.Module:
        """Linear map (..., this process's channels of d_in) to (..., d_out), summed over all channels of all ranks.

        It begins as small as one that writes to the residual stream, or like the others where `residual` is false.
        """
        return (ResidualLinear if residual else Linear)(d_in, d_out)

    def last_row(self, d_in: int, d_out: int) -> nn.Module:
        """The same as a mixer's last map, to be applied by finish()."""
        return self.row(d_in, d_out)

    def whole(self, d_in: int, d_out: int) -> nn.Module:
        """Linear map (..., d_in) to (..., d_out) that every rank holds whole; its input is in the tp region.

        What of its output goes to the rank's own heads passes copy_to_tp_region(): its gradient is that of all heads.
        """
        return Linear(d_in, d_out)

    def gather_from_sp_region(self, x: Tensor, *, tensor_parallel_output_grad: bool = True) -> Tensor:
        """x (B, T', E) as the block holds it, in the tp region, (B, T, E).

        Args:
            x: All tokens, or this rank's.
            tensor_parallel_output_grad: Whether ranks do different things with the result, whose gradients are summed;
                false for what every rank computes alike and then scatters.
        """
        return x

    def copy_to_tp_region(self, x: Tensor) -> Tensor:
        """x (B, T, E) as input of column maps: unchanged, its gradient summed over the ranks that share the heads."""
        return x

    def finish(self, row: nn.Module, x: Tensor) -> Tensor:
        """What last_row() makes of x (B, T, F'), as the block holds it, (B, T', E)."""
        return linear(row, x)

    def scatter_to_sp_region(self, x: Tensor) -> Tensor:
        """x (B, T, E) as the block holds it, (B, T', E)."""
        return x

    def replicated(self, full: Tensor) -> nn.Parameter:
        """A parameter that every rank holds whole. Like those of heads it is not weight-decayed."""
        return self.per_head(full)

    def own(self, full: Tensor) -> Tensor:
        """This process's heads of a constant whose first axis is heads."""
        return full

    def sum_over_tp_region(self, x: Tensor) -> Tensor:
        """What the heads of all ranks come to, from a sum over those of this one; its gradient is the sum of theirs."""
        return x


class FromParts(nn.Module):
    """A mixer, or a module inside one, that is made by (config, parts) and has parameters of its own.

    Its constructor gives them their initial values. Those of linear maps are the makers'. Functions of tensors that are
    its attributes may be compiled.
    """

    def compile_functions(self, **settings: Any) -> None:
        """Compiles functions that are attributes, of modules inside as well; settings are torch.compile's."""
        for module in self.modules():
            found = vars(module) if isinstance(module, FromParts) else {}
            for name in [name for name, value in found.items() if isinstance(value, FunctionType)]:
                setattr(module, name, torch.compile(found[name], **settings))

    def begin_recalling(self) -> None:
        """Changes the initial linear maps where config.memory_init says so; the constructor calls it, too."""

    def with_room(self, state: Any) -> Any:
        """The same state in a form whose shapes stay while tokens come one by one, where there is one."""
        return state


_LEAST_WORK = 1 << 23  # multiplications of a product below which MKL is as fast


def fits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether product(x, weight) goes to oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= _LEAST_WORK
        and _images(x) > 0
        and torch.backends.mkldnn.is_available()
        and not torch.compiler.is_compiling()
        and not autocast_is_on(x)
    )


def _images(x: Tensor) -> int:
    """Among how many images the rows of x are divided evenly; 0 if they cannot be: torch asks for more than 16."""
    rows = x.numel() // x.shape[-1]
    return next((images for images in range(32, 16, -1) if rows % images == 0), 0)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., d_in) times a weight (d_out, d_in) transposed.

    On a CPU torch takes float32 to MKL, which does half as much a second as oneDNN on AMD's processors with AVX-512,
    and convolutions to oneDNN: so a large product is a convolution here, of images one pixel high.
    """
    if not fits_onednn(x, weight):
        return F.linear(x, weight)
    images = x.reshape(_images(x), 1, -1, x.shape[-1]).permute(0, 3, 1, 2)
    return F.conv2d(images, weight[:, :, None, None]).permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)


class Linear(nn.Linear):
    """A linear map without bias."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        return product(x, self.weight)


class ResidualLinear(Linear):
    """A linear map that writes to the residual stream; it starts smaller."""


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) without the bias that Megatron-core's linears return beside it."""
    out = module(x)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def copy_rows(source: nn.Module, target: nn.Module, heads: int, rows: int, at: int = 0) -> None:
    """Gives rows of every head in one column map, from `at` on, the weights of the first ones of one."""
    of_source, of_target = (module.get_parameter("weight").unflatten(0, (heads, -1)) for module in (source, target))
    of_target[:, at : at + rows] = of_source[:, :rows]


def next_token_kernels(heads: int, keys: int, values: int, taps: int) -> Tensor:
    """Convolutions of queries, keys and values, (H, 2 K + V, taps), with config.memory_init "next_token".

    Where one map makes queries and keys, the key of token t + 1 is the query of token t: a random mixture of the last
    taps - 1 tokens, later ones more, so that the places that resemble each other are those with the same tokens before
    them. Values begin as the token's own.
    """
    back = torch.arange(taps - 2, -1, -1)  # 0 for the token itself
    mixture = torch.where(back == 0, 1.0, torch.randn(heads, keys, taps - 1) * 0.7**back)
    kernels = torch.zeros(heads, 2 * keys + values, taps)
    kernels[:, :keys, 1:] = kernels[:, keys : 2 * keys, :-1] = mixture
    kernels[:, 2 * keys :, -1] = 1.0
    return kernels


_WRITTEN: ContextVar["list[Tensor] | None"] = ContextVar("written", default=None)


@contextmanager
def steps_of_memories() -> Iterator[list[Tensor]]:
    """Collects what every memory written meanwhile takes steps of, for objectives that ask for less of it.

    Of Titans theta / (1 - eta), (B, T, heads, L_M), all that momentum will make of a step: asked for less of theta
    alone, a model writes as much by momentum that lasts, and what it has read is there a hundred tokens late. It is
    theta before gate_margin cuts it, which falls on where a gate is closed, so that a text which is a little different
    does not open it. Of the delta rule beta, (B, T, heads).
    """
    steps: list[Tensor] = []
    before = _WRITTEN.set(steps)
    try:
        yield steps
    finally:
        _WRITTEN.reset(before)


def written(step: Callable[[], Tensor]) -> None:
    """Gives a memory's steps to steps_of_memories; they are worked out only where somebody collects them."""
    if (steps := _WRITTEN.get()) is not None:
        steps.append(step())


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * F) to (B, T, heads, F)."""
    return x.unflatten(-1, (heads, -1))


def widened(x: Tensor) -> Tensor:
    """x in float32 at least: gates and rates are exponentials of what half precision would round."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RmsNorm(torch.autograd.Function):
    """rms_norm, which keeps its input alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        wide = widened(x)
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        inverse = torch.rsqrt(widened(x).square().mean(-1, keepdim=True) + ctx.eps)
        normed, of_normed = widened(x) * inverse, widened(gradient * weight)
        along = (of_normed * normed).mean(-1, keepdim=True)
        of_weight = (gradient * normed.to(x.dtype)).sum_to_size(weight.shape)
        return (torch.addcmul(of_normed, normed, along, value=-1) * inverse).to(x.dtype), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, in float32 at least."""
    return _RmsNorm.apply(x, weight, eps)


_LEAST_NORM = 1e-6  # what is shorter is divided by it


class _UnitSilu(torch.autograd.Function):
    """unit_silu, which keeps its input alone for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.normalize(widened(F.silu(x)), dim=-1, eps=_LEAST_NORM).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        y, of_unit = widened(F.silu(x)), widened(gradient)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        size = norm.clamp_min(_LEAST_NORM)
        unit = y / size
        along = (of_unit * unit).sum(-1, keepdim=True) * (norm >= _LEAST_NORM)
        of_y = torch.addcmul(of_unit, unit, along, value=-1) / size
        return torch.ops.aten.silu_backward(of_y.to(x.dtype), x)


def unit_silu(x: Tensor) -> Tensor:
    """SiLU, then unit L2 norm over the last axis, in float32 at least."""
    return _UnitSilu.apply(x)


class _Convolution(torch.autograd.Function):
    """apply(x, kernel) is the sum over taps, (B, T, H, F), of x (B, K - 1 + T, H, F) and a kernel (H, F, K).

    For float32 on a CPU, where oneDNN's convolution takes a tenth of the time of torch's sums; for the gradient at the
    kernel it takes longer than these.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _convolved(x, kernel, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, kernel = ctx.saved_tensors
        taps, length = kernel.shape[-1], gradient.shape[1]
        # One for all taps, where no second gradient is asked for: new memory takes longer than the product in it.
        room = None if torch.is_grad_enabled() else torch.empty_like(gradient)
        of_taps = [torch.mul(gradient, x[:, tap : tap + length], out=room).sum((0, 1)) for tap in range(taps)]
        return _convolved(gradient, kernel.flip(-1), taps - 1), torch.stack(of_taps, -1)


def _convolved(x: Tensor, kernel: Tensor, zeros: int) -> Tensor:
    """A depthwise convolution of x (B, T, H, F) with so many zeros at its ends."""
    # An image one pixel high, its channels last, is what oneDNN takes as it lies in memory.
    image, weights = x.flatten(2).mT.unsqueeze(2), kernel.flatten(0, 1)[:, None, None]
    return F.conv2d(image, weights, padding=(0, zeros), groups=len(weights)).squeeze(2).mT.unflatten(2, x.shape[2:])


def causal_conv(
    x: Tensor, tail: Tensor, kernel: Tensor, rows: PackedRows | None = None, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time.

    Args:
        x: (B, T, H, F).
        tail: The K - 1 tokens before x, (B, K - 1, H, F), zeros at the start of a sequence.
        kernel: (H, F, K), the last tap is the token's own.
        rows: Documents and padding of x; padding stands behind the real tokens.
        start: What stands before a document, (1, K - 1, H, F); zeros if None.

    Returns:
        (B, T, H, F), and the tail for the next piece.
    """
    taps, length = kernel.shape[-1], x.shape[1]
    joined = torch.cat([tail, x], 1)
    if rows is None and length == 1:
        return (joined * kernel.movedim(-1, 0)).sum(1, keepdim=True), joined[:, 1:]
    if rows is None and x.device.type == "cpu" and x.dtype == torch.float32 and not autocast_is_on(x):
        return _Convolution.apply(joined, kernel), joined[:, length:]
    if rows is None:
        # As a sum over taps: torch's depthwise convolution copies x twice, and takes longer for one token than for ten.
        out = joined[:, :length] * kernel[..., 0]
        for tap in range(1, taps):
            out = torch.addcmul(out, joined[:, tap : tap + length], kernel[..., tap])
        return out, joined[:, length:]
    before = torch.zeros_like(tail) if start is None else start.expand_as(tail)
    pool = torch.cat([joined, before], 1)

    def earlier(token: Tensor, document: Tensor, position: Tensor, back: int) -> Tensor:
        """Place in the pool of what stands `back` tokens before these, (B, I)."""
        inside = (document <= 0) | (position >= back)
        return torch.where(inside, taps - 1 + token - back, length + 2 * (taps - 1) + position - back)

    token = torch.arange(length, device=x.device).expand(x.shape[:2])
    out = torch.zeros_like(x)
    for back in range(taps):
        places = earlier(token, rows.documents, rows.positions, back)
        out = out + take(pool, places) * kernel[..., taps - 1 - back]
    last = rows.ends.unsqueeze(1) - 1
    position = rows.positions.gather(1, last.clamp_min(0))
    ended = [earlier(last, rows.last_documents.unsqueeze(1), position, back) for back in range(taps - 2, -1, -1)]
    return out, take(pool, torch.cat(ended, 1)) if ended else tail

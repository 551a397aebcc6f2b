"""FlashAttention for the window, merged exactly with the persistent prefix, forward and backward.

FlashAttention cannot express "a window, and these keys always". Both parts are computed apart and merged by their
log-sum-exps; the backward pass of each part is given the merged output and log-sum-exp, which makes its softmax the
merged one.

The kernels are those of the flash-attn package or, without it, the ones that torch brings for its own attention: its
public function takes a mask or no window, but the operator beneath takes a window and gives the log-sum-exp. Nothing of
this has run on a GPU: `pytest -m gpu tests/attention` compares it there.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .attend import Documents, Prefix

Forward = Callable[[Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor | None], tuple[Tensor, Tensor, Tensor]]

_WIDEST = 256  # head of torch's kernels


@cache
def flash_installed() -> bool:
    """Whether the flash-attn package can be imported; a mere folder of its name, as flash-attn-4 makes one, cannot."""
    found = importlib.util.find_spec("flash_attn")
    return found is not None and found.origin is not None


def why_not_flash(queries: Tensor, keys: Tensor, keys_per_token: int, documents: "Documents | None") -> str:
    """Why FlashAttention cannot compute this, in a sentence; empty if it can. Arguments are those of attend()."""
    if not queries.is_cuda or queries.dtype not in (torch.bfloat16, torch.float16):
        return f"attention backend 'flash' got {queries.dtype} on {queries.device}; it needs half precision on CUDA"
    if keys_per_token != 1:
        return "attention backend 'flash' takes one key for each token; use 'sdpa' for MAC segments"
    if documents is not None and keys.shape[1] != queries.shape[1]:
        # Its ragged form takes whole documents, not the tail of one that began earlier.
        return "attention backend 'flash' cannot go on inside a packed row; use 'sdpa' or 'auto'"
    if flash_installed():
        return ""
    width, device = queries.shape[-1], torch.cuda.get_device_properties(queries.device)
    if width % 8 or width > _WIDEST or device.major < 8 or not torch.backends.cuda.is_flash_attention_available():
        return (
            f"attention backend 'flash' without the flash-attn package takes head widths of 8, 16, ... {_WIDEST} on "
            f"GPUs since Ampere, and this is {width} on {device.name}; install the 'gpu' extra, or use 'sdpa'"
        )
    return ""


def flash_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int,
    keys_per_token: int,
    prefix: "Prefix | None",
    documents: "Documents | None",
) -> Tensor:
    """attend() through FlashAttention; see there for shapes.

    Raises:
        ValueError: It cannot compute this.
    """
    if reason := why_not_flash(queries, keys, keys_per_token, documents):
        raise ValueError(reason)
    bounds = None if documents is None else document_bounds(documents.queries)
    if prefix is not None:
        parts = (queries, keys, values, prefix.queries, prefix.keys, prefix.values)
        kernels = (_flash_forward, _flash_backward) if flash_installed() else (torch_forward, torch_backward)
        return PrefixMerge.apply(*parts, window, bounds, *kernels)
    if not flash_installed():
        return torch_forward(queries, keys, values, window, bounds)[0]
    window_size = (window - 1 if window else -1, 0)
    if bounds is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(queries, keys, values, causal=True, window_size=window_size)
    from flash_attn import flash_attn_varlen_func

    flat = (x.flatten(0, 1) for x in (queries, keys, values))
    longest = queries.shape[1]
    out = flash_attn_varlen_func(*flat, bounds, bounds, longest, longest, causal=True, window_size=window_size)
    return out.view_as(queries)


def document_bounds(documents: Tensor) -> Tensor:
    """Where documents (B, T) begin in the tokens of all rows, and the number of tokens behind them, int32."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=documents.numel()).to(torch.int32)


class PrefixMerge(torch.autograd.Function):
    """One softmax over a causal window and a prefix, each computed by the kernels given.

    The kernels take a window (negative: no causality, every key is seen) and the bounds of documents (None: rows are
    whole), and return the output (B, T, H, D) and the log-sum-exp (B, H, T).
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        plain_queries: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        window: int,
        bounds: Tensor | None,
        kernel: Forward,
        backward_kernel: Backward,
    ) -> Tensor:
        near, near_lse = kernel(queries, keys, values, window, bounds)
        always, always_lse = kernel(plain_queries, prefix_keys, prefix_values, -1, None)
        lse = torch.logaddexp(near_lse, always_lse)
        share = (near_lse - lse).exp().transpose(1, 2).unsqueeze(-1).to(near.dtype)
        output = share * near + (1.0 - share) * always
        ctx.save_for_backward(queries, keys, values, plain_queries, prefix_keys, prefix_values, output, lse)
        ctx.window, ctx.bounds, ctx.kernel = window, bounds, backward_kernel
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, plain_queries, prefix_keys, prefix_values, output, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        near = ctx.kernel(grad, queries, keys, values, output, lse, ctx.window, ctx.bounds)
        always = ctx.kernel(grad, plain_queries, prefix_keys, prefix_values, output, lse, -1, None)
        return (*near, *always, None, None, None, None)


def _flash_window(window: int) -> tuple[bool, int, int]:
    """causal, window left, window right as flash-attn wants them."""
    return (False, -1, -1) if window < 0 else (True, window - 1 if window else -1, 0)


def _flash_forward(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_varlen_forward

    causal, left, right = _flash_window(window)
    scale = 1.0 / math.sqrt(queries.shape[-1])
    if bounds is None:
        tensors = (x.contiguous() for x in (queries, keys, values))
        output, lse, *_ = _flash_attn_forward(*tensors, 0.0, scale, causal, left, right, 0.0, None, False)
        return output, lse
    flat = (x.flatten(0, 1).contiguous() for x in (queries, keys, values))
    limits = (bounds, bounds, queries.shape[1], queries.shape[1])
    output, lse, *_ = _flash_attn_varlen_forward(*flat, *limits, 0.0, scale, causal, left, right)
    # Of ragged rows the log-sum-exp comes as (H, B T).
    return output.view_as(queries), lse.unflatten(1, queries.shape[:2]).transpose(0, 1)


def _flash_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    window: int,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward

    causal, left, right = _flash_window(window)
    scale = 1.0 / math.sqrt(queries.shape[-1])
    queries, keys, values = (x.contiguous() for x in (queries, keys, values))
    grads = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    tensors = (grad, queries, keys, values, output)
    if bounds is None:
        options = (0.0, scale, causal, left, right, 0.0, None, False)
        _flash_attn_backward(*tensors, lse, *grads, *options)
        return grads
    flat = (x.flatten(0, 1) for x in tensors)
    ragged_lse = lse.transpose(0, 1).flatten(1).contiguous()
    limits = (bounds, bounds, queries.shape[1], queries.shape[1])
    options = (0.0, scale, causal, left, right, 0.0, None, False)
    _flash_attn_varlen_backward(*flat, ragged_lse, *(x.flatten(0, 1) for x in grads), *limits, *options)
    return grads


def torch_forward(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """PrefixMerge's forward kernel by torch's FlashAttention, whose output can also be differentiated as it is."""
    tensors, limits = _torch_layout(bounds, queries, keys, values)
    causal, left, right = _flash_window(window)
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        *tensors,
        *limits,
        0.0,  # no dropout
        causal,
        False,  # no mask of what was dropped
        scale=1.0 / math.sqrt(queries.shape[-1]),
        window_size_left=left,
        window_size_right=right,
    )
    if bounds is None:
        return output, lse
    return output.view_as(queries), lse.unflatten(1, queries.shape[:2]).transpose(0, 1)


def torch_backward(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    lse: Tensor,
    window: int,
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PrefixMerge's backward kernel by torch's FlashAttention."""
    tensors, limits = _torch_layout(bounds, queries, keys, values)
    (grad, output), _ = _torch_layout(bounds, grad, output)
    causal, left, right = _flash_window(window)
    grads = torch.ops.aten._flash_attention_backward(
        grad,
        *tensors,
        output,
        (lse if bounds is None else lse.transpose(0, 1).flatten(1)).contiguous(),
        *limits,
        0.0,
        causal,
        lse.new_empty(2, dtype=torch.uint64),  # the state of dropout, of which there is none
        lse.new_empty((), dtype=torch.uint64),
        scale=1.0 / math.sqrt(queries.shape[-1]),
        window_size_left=left,
        window_size_right=right,
    )
    of_queries, of_keys, of_values = grads
    return of_queries.view_as(queries), of_keys.view_as(keys), of_values.view_as(values)


def _torch_layout(bounds: Tensor | None, *tensors: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Tensors as the operator takes them, and its bounds and longest sequences of queries and keys, the 2nd tensor."""
    if bounds is None:
        limits = (None, None, tensors[0].shape[1], tensors[1].shape[1])
        return [x.contiguous() for x in tensors], limits
    longest = tensors[0].shape[1]
    return [x.flatten(0, 1).contiguous() for x in tensors], (bounds, bounds, longest, longest)

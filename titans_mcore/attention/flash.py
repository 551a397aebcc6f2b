"""FlashAttention for the window, merged exactly with the persistent prefix, forward and backward.

FlashAttention cannot express "a window, and these keys always". Both parts are computed apart and merged by their
log-sum-exps; the backward pass of each part is given the merged output and log-sum-exp, which makes its softmax the
merged one.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attend import Prefix

Forward = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


def flash_installed() -> bool:
    """Whether the flash-attn package can be imported."""
    return importlib.util.find_spec("flash_attn") is not None


def flash_attend(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, keys_per_token: int, prefix: "Prefix | None"
) -> Tensor:
    """attend() through flash-attn; see there for shapes.

    Raises:
        ValueError: flash-attn is missing, or the tensors are not half-precision CUDA tensors.
    """
    if not flash_installed():
        raise ValueError("attention backend 'flash' needs the flash-attn package; install this project's 'gpu' extra")
    if not queries.is_cuda or queries.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"attention backend 'flash' got {queries.dtype} on {queries.device}; it needs bfloat16 or float16 on CUDA"
        )
    if keys_per_token != 1:
        raise ValueError("attention backend 'flash' takes one key for each token; use 'sdpa' for MAC segments")
    if prefix is None:
        from flash_attn import flash_attn_func

        return flash_attn_func(queries, keys, values, causal=True, window_size=(window - 1 if window else -1, 0))
    return PrefixMerge.apply(
        queries, keys, values, prefix.queries, prefix.keys, prefix.values, window, _flash_forward, _flash_backward
    )


class PrefixMerge(torch.autograd.Function):
    """One softmax over a causal window and a prefix, each computed by the kernels given.

    The kernels take a window (negative: no causality, every key is seen) and return the output (B, T, H, D) and the
    log-sum-exp (B, H, T).
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
        kernel: Forward,
        backward_kernel: Backward,
    ) -> Tensor:
        near, near_lse = kernel(queries, keys, values, window)
        always, always_lse = kernel(plain_queries, prefix_keys, prefix_values, -1)
        lse = torch.logaddexp(near_lse, always_lse)
        share = (near_lse - lse).exp().transpose(1, 2).unsqueeze(-1).to(near.dtype)
        output = share * near + (1.0 - share) * always
        ctx.save_for_backward(queries, keys, values, plain_queries, prefix_keys, prefix_values, output, lse)
        ctx.window, ctx.kernel = window, backward_kernel
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, plain_queries, prefix_keys, prefix_values, output, lse = ctx.saved_tensors
        grad = grads[0].contiguous()
        near = ctx.kernel(grad, queries, keys, values, output, lse, ctx.window)
        always = ctx.kernel(grad, plain_queries, prefix_keys, prefix_values, output, lse, -1)
        return (*near, *always, None, None, None)


def _flash_window(window: int) -> tuple[bool, int, int]:
    """causal, window left, window right as flash-attn wants them."""
    return (False, -1, -1) if window < 0 else (True, window - 1 if window else -1, 0)


def _flash_forward(queries: Tensor, keys: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    causal, left, right = _flash_window(window)
    scale = 1.0 / math.sqrt(queries.shape[-1])
    tensors = (x.contiguous() for x in (queries, keys, values))
    output, lse, *_ = _flash_attn_forward(*tensors, 0.0, scale, causal, left, right, 0.0, None, False)
    return output, lse


def _flash_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, output: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    causal, left, right = _flash_window(window)
    scale = 1.0 / math.sqrt(queries.shape[-1])
    queries, keys, values = (x.contiguous() for x in (queries, keys, values))
    grads = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    _flash_attn_backward(
        grad, queries, keys, values, output, lse, *grads, 0.0, scale, causal, left, right, 0.0, None, False
    )
    return grads

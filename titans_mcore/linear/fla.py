"""linear_scan by flash-linear-attention's Triton kernels (the package fla-core), on a GPU: `model.linear_backend fla`.

The kernels know sequences end to end, each with a state before it; documents become such sequences, and padding is left
out. Nothing of this has run on a GPU: `pytest -m gpu tests/linear` compares it there. Without one arguments, sequences
and states are compared with fla-core's own loops over tokens (tests/linear/test_fla.py).
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..memory import PackedRows
from ..memory.triton_faults import dotted, fault_here, installed_version, triton_version

LEAST = (0, 6)  # of fla-core: keyword arguments and the layout of states have changed between versions


def why_not_fla(dtype: torch.dtype, device: torch.device) -> str:
    """A sentence on why the kernels cannot take this, empty when they can.

    Args:
        dtype: Of the values.
        device: Of the values.
    """
    if importlib.util.find_spec("fla") is None:
        return 'linear_backend is fla, and fla-core is not installed; pip install "fla-core>=0.6", or set it to torch'
    if (found := installed_version("fla-core")) < LEAST:
        return f"linear_backend is fla, and fla-core is {dotted(found)}; it must be {dotted(LEAST)} or later"
    if device.type != "cuda":
        return f"linear_backend is fla, whose kernels want a CUDA device, and this is {device.type}; set it to torch"
    if fault := fault_here(device):  # whatever helps against it: fla-core's backward pass refuses these versions itself
        return (
            f"linear_backend is fla, and Triton {dotted(triton_version())} makes wrong gradients on this GPU "
            f"({fault.source}); install Triton {fault.fixed} or later, or set it to torch"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"linear_backend is fla, whose kernels want bfloat16, and values are {dtype}; set it to torch"
    return ""


def by_sequences(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    rows: PackedRows | None,
) -> tuple[Tensor, Tensor]:
    """A kernel of fla-core over rows of documents.

    Args:
        kernel: Takes q, k and v (1, N, H, F), g and beta (1, N, H) where there are any, scale, initial_state (D, H, K,
            V) and cu_seqlens, the D + 1 borders of sequences; returns what is read and the states behind them.
        queries: This and what follows: as linear_scan's.
    """
    batch, length, heads, _ = values.shape
    each = heads // keys.shape[2]
    if each > 1:
        queries, keys = queries.repeat_interleave(each, 2), keys.repeat_interleave(each, 2)
    document = torch.zeros(batch, length, dtype=torch.long, device=values.device)
    if rows is not None and rows.starts is not None:
        document = rows.starts.to(values.device).long().cumsum(1)
    real = torch.ones_like(document, dtype=torch.bool)
    if rows is not None and rows.real is not None:
        real = rows.real.to(values.device)
    places = real.flatten().nonzero().squeeze(1)
    row = places // max(length, 1)
    sequence = row * (length + 1) + document.flatten()[places]
    names, counts = torch.unique_consecutive(sequence, return_counts=True)
    # A row ends in its last document, whose state is 0 where none of its tokens are real, or as it was before.
    last = torch.arange(batch, device=values.device) * (length + 1) + (document[:, -1] if length else 0)
    untouched = torch.where((last % (length + 1) == 0)[:, None, None, None], state, 0.0)
    if not len(places):
        return values * 0, untouched
    of_row, goes_on = names // (length + 1), names % (length + 1) == 0
    before = torch.where(goes_on[:, None, None, None], state[of_row], 0.0)
    borders = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def packed(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten(0, 1)[places].unsqueeze(0)

    found: dict[str, Any] = {"q": packed(queries), "k": packed(keys), "v": packed(values)}
    found |= {name: packed(x) for name, x in (("g", log_decay), ("beta", beta)) if x is not None}
    read, after = kernel(**found, scale=scale, initial_state=before, cu_seqlens=borders)
    out = read.new_zeros(batch * length, heads, values.shape[-1]).index_copy(0, places, read[0])
    hits = names.unsqueeze(0) == last.unsqueeze(1)
    ended = after[hits.long().argmax(1)].to(state.dtype)
    ended = torch.where(hits.any(1)[:, None, None, None], ended, untouched)
    return out.unflatten(0, (batch, length)).to(values.dtype), ended


def fla_kernel(log_decay: Tensor | None, beta: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """fla-core's for such a recurrence, as `by_sequences` takes it."""
    if beta is None:
        place, name = "simple_gla", "chunk_simple_gla"
    elif log_decay is None:
        place, name = "delta_rule", "chunk_delta_rule"
    else:
        place, name = "gated_delta_rule", "chunk_gated_delta_rule"
    function = getattr(importlib.import_module(f"fla.ops.{place}"), name)

    def kernel(*, v: Tensor, beta: Tensor | None = None, **named: Any) -> tuple[Tensor, Tensor]:
        if beta is not None:
            named["beta"] = beta.to(v.dtype)
        return function(v=v, **named, output_final_state=True)

    return kernel

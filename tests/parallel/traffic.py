"""What a process sends to others, counted where every collective of torch.distributed passes.

All of them, Megatron-core's and DeepSpeed's included, end in a method of torch's ProcessGroup; whoever kept a function
of torch.distributed for itself is seen too.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

# Method of ProcessGroup, in older and newer versions of torch: its name among the collectives. What is received was
# counted where it was sent.
_METHODS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "all_gather_single_coalesced": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "send": "send",
}


@dataclass
class Traffic:
    """Calls and bytes by group and operation.

    Bytes are those of the whole tensor: what is reduced, gathered or scattered, or sent to one process.

    Attributes:
        calls: By "group operation", such as "tensor all_reduce".
        bytes: Likewise.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted_traffic(groups: Mapping[str, dist.ProcessGroup], least_bytes: int = 100) -> Iterator[Traffic]:
    """Counts what this process sends inside the `with`.

    Args:
        groups: Groups by the name they are counted under; others count as "other".
        least_bytes: Smaller messages are left out: losses, norms, stop signals.
    """
    found = Traffic()
    names = {group.group_name: name for name, group in groups.items()}
    kind: Any = dist.ProcessGroup
    before = {method: vars(kind)[method] for method in _METHODS if method in vars(kind)}

    def counting(method: str) -> Any:
        def counted(group: dist.ProcessGroup, *arguments: Any, **named: Any) -> Any:
            size = max((_bytes(x) for x in (*arguments, *named.values())), default=0)
            if group.size() > 1 and size >= least_bytes:
                key = f"{names.get(group.group_name, 'other')} {_METHODS[method]}"
                found.calls[key] += 1
                found.bytes[key] += size
            return before[method].__get__(group)(*arguments, **named)

        return counted

    for method in before:
        setattr(kind, method, counting(method))
    try:
        yield found
    finally:
        for method, original in before.items():
            setattr(kind, method, original)


def _bytes(argument: Any) -> int:
    """Of a tensor, or of all tensors in (lists of) lists; 0 of anything else."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, list | tuple):
        return sum(map(_bytes, argument))
    return 0

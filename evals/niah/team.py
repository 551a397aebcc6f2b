"""The processes that an evaluation is spread over."""

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    """From 0; 0 plans and reports."""
    size: int = 1
    """Processes."""

    @classmethod
    def here(cls) -> "Team":
        """The processes that torch.distributed runs with."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def told(self, value: Value | None) -> Value:
        """What process 0 says; the others' values do not count."""
        said = [value]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        assert said[0] is not None
        return said[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.all_gather_object([None] * self.size, self.rank)

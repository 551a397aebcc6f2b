"""What the rows of a step leave for those of the next (data.carry_state), on the rank that computes them.

carried/tp-RR-data-DDD.safetensors
    MICRO_BATCH.BLOCK.NAME      the tensors of every block's state, as they are
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from titans_mcore.config import TitansConfig
from titans_mcore.memory import TensorTree
from titans_mcore.tensor_files import read_tensors


class CarriedState:
    """The states behind the last step's rows; nothing before the first step."""

    def __init__(self, config: TitansConfig) -> None:
        self._kinds = [mixer.state for mixer in config.blocks]
        self.states: dict[int, list[TensorTree]] = {}
        """One state a block, detached, by the micro-batch's place among this rank's of a step."""

    def frozen(self) -> "CarriedState":
        """The states as they are now; a step makes new ones and changes none."""
        copy = CarriedState.__new__(CarriedState)
        copy._kinds, copy.states = self._kinds, dict(self.states)
        return copy

    def save(self, file: Path) -> None:
        """Writes them."""
        file.parent.mkdir(exist_ok=True)
        tensors = {
            f"{place}.{block}.{name}": tensor
            for place, states in self.states.items()
            for block, state in enumerate(states)
            for name, tensor in state.state_dict().items()
        }
        save_file(tensors, file)

    def restore(self, file: Path, device: torch.device) -> None:
        """Reads them, bit for bit.

        Raises:
            ValueError: The file cannot be read, or holds the states of another model.
        """
        found: dict[int, dict[int, dict[str, Tensor]]] = {}
        for key, tensor in read_tensors(file, "carried state")[0].items():
            place, block, name = key.split(".", 2)
            found.setdefault(int(place), {}).setdefault(int(block), {})[name] = tensor
        self.states = {
            place: [
                kind.from_state_dict(blocks[block]).map(lambda x: x.clone().to(device))
                for block, kind in enumerate(self._kinds)
            ]
            for place, blocks in found.items()
        }

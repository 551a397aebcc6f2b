"""What a Titans model carries from one piece of a sequence to the next, as a cache of transformers.

A layer holds a mixer's state, of constant size however long the sequence has become. Pass `TitansCache(layers)` as
`cache` to read a sequence in pieces, or to keep what `generate` has read; `save` and `load` keep it on disk.
"""

import json
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..decoding import Decoder
from ..memory import TensorTree
from ..mixers import MIXERS

_KINDS = {mixer.state.__name__: mixer.state for mixer in MIXERS.values()}


class TitansCacheLayer(CacheLayerMixin):
    """One block's state, replaced as a whole by every piece, or brought forward in place by a Decoder.

    Attributes:
        state: The mixer's state after `tokens` tokens; None before the first.
        tokens: Tokens read so far.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: TensorTree | None = None
        self.tokens = 0

    def advance(self, state: TensorTree, tokens: int) -> None:
        """Takes the state after `tokens` more tokens."""
        self.state, self.tokens, self.is_initialized = state, self.tokens + tokens, True

    def reset(self) -> None:
        """Back to the start of a sequence."""
        self.state, self.tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.state is not None:
            self.state = self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times in a row."""
        if self.state is not None:
            self.state = self.state.map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def get_seq_length(self) -> int:
        """Tokens read so far."""
        return self.tokens

    def get_max_length(self) -> int:
        """-1: there is no longest sequence."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under its name in transformers 4."""
        return -1

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Length and offset of an attention mask over all tokens, which the model itself never builds."""
        new = len(query_length) if isinstance(query_length, Tensor) else query_length
        return self.tokens + new, 0

    def crop(self, *_: Any, **__: Any) -> None:
        """Refused: a memory cannot take back what it has learned from a token."""
        raise NotImplementedError(
            "a Titans cache cannot be shortened: the memory has learned from every token; copy the cache before the "
            "tokens that may be taken back (assisted generation is not possible)"
        )

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the state comes whole from the mixer."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refused: there are no keys and values of single tokens to add."""
        raise NotImplementedError("a Titans cache holds the mixers' states; they are set by advance()")


class TitansCache(Cache):
    """The states of all blocks.

    Args:
        num_layers: Blocks of the model.

    Attributes:
        decoder: Of the model that goes on from these states; a copy of the cache begins without.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[TitansCacheLayer() for _ in range(num_layers)])
        self.decoder: Decoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "decoder": None}

    @property
    def blocks(self) -> list[TitansCacheLayer]:
        """A layer for each block of the model."""
        return self.layers  # type: ignore[return-value]

    def detach(self) -> "TitansCache":
        """Cuts the states from the graph that made them (truncated back-propagation); returns this cache."""
        for layer in self.blocks:
            layer.state = None if layer.state is None else layer.state.detach()
        return self

    def to(self, device: torch.device | str) -> "TitansCache":
        """Moves the states; returns this cache."""
        for layer in self.blocks:
            layer.state = None if layer.state is None else layer.state.to(device)
        return self

    def save(self, file: str | PathLike[str], about: Mapping[str, str] | None = None) -> None:
        """Writes the states to a safetensors file, of a size that does not depend on what has been read.

        Args:
            file: The file.
            about: Words to keep in its header beside the cache's own.
        """
        tensors: dict[str, Tensor] = {}
        for index, layer in enumerate(self.blocks):
            # States hold views of parameters and of each other, which a file may not.
            own = {} if layer.state is None else layer.state.map(lambda tensor: tensor.detach().clone()).state_dict()
            tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in own.items()}
        kinds = ["" if layer.state is None else type(layer.state).__name__ for layer in self.blocks]
        record = {"titans_cache": json.dumps({"kinds": kinds, "tokens": self.get_seq_length()})}
        save_file(tensors, file, {**(about or {}), **record})

    @classmethod
    def load(cls, file: str | PathLike[str], device: torch.device | str = "cpu") -> "TitansCache":
        """The cache that `save` wrote.

        Raises:
            ValueError: The file is missing, damaged, or holds something else.
        """
        try:
            with safe_open(file, "pt", device=str(device)) as opened:
                record = json.loads((opened.metadata() or {})["titans_cache"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            cache = cls(len(record["kinds"]))
            for index, (layer, kind) in enumerate(zip(cache.blocks, record["kinds"], strict=True)):
                own = {key.removeprefix(f"{index}."): x for key, x in tensors.items() if key.startswith(f"{index}.")}
                if kind:
                    layer.advance(_KINDS[kind].from_state_dict(own), record["tokens"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{file} is no Titans cache that can be read ({error!r}); save one again") from error
        return cache

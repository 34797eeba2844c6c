"""A checkpoint that is nowhere: random weights, made on the device when the loader asks for them.

They go through the same loading as real ones, so what is timed and what the memory must hold is
what a user's model would need, less the disk.
"""

import zlib
from typing import Final

import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.sharding import WHOLE
from mixfleet_engine.weights import weight_shapes

_EMBEDDING_STD: Final = 1.0


class RandomCheckpoint:
    """Implements :class:`~mixfleet_engine.weights.Checkpoint`.

    Every matrix keeps the size of what goes through it: its numbers have a standard deviation of
    1 / sqrt(inputs). Embeddings of different tokens then stay apart through all layers, and random
    routers choose all experts about equally often. Norms are 1.

    Args:
        config: Sizes.
        device: Where the weights are made.
        dtype: Of all of them, as in a file.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self._shapes = weight_shapes(config)
        self._device = device
        self._dtype = dtype

    @property
    def names(self) -> frozenset[str]:
        """Every weight's name."""
        return frozenset(self._shapes)

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the weight itself: nothing is spread over several tensors."""
        return {name: shape}

    def found_shape(self, stored_name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._shapes[stored_name]

    def read(self, name: str, rows: slice = WHOLE, columns: slice = WHOLE) -> Tensor:
        """Return rows and columns of a weight, the same numbers each time on one kind of device."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype, device=self._device)[rows]
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        std = _EMBEDDING_STD if name.startswith("tok_embeddings") else shape[1] ** -0.5
        matrix = torch.empty(shape, dtype=self._dtype, device=self._device)
        return matrix.normal_(0.0, std, generator=generator)[rows, columns]

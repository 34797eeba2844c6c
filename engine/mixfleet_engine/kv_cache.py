"""Keys and values of all running sequences, in blocks that sequences share out among them.

A slot holds one token's key and value of one layer; slot ``s`` is entry ``s % block_size`` of
block ``s // block_size``. Which block is whose is the scheduler's business.
"""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig


class KvCache:
    """Per layer two tensors ``[num_blocks, block_size, n_kv_heads, head_dim]``."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_blocks, block_size, config.n_kv_heads, config.head_dim)
        self._layers = [_zeros(shape, dtype, device) for _ in range(config.n_layers)]

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the keys and the values of one layer."""
        keys, values = self._layers[number]
        return keys, values

    def write(self, number: int, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Store a layer's keys and values, ``[T, n_kv_heads, head_dim]``, at ``slots`` ``[T]``."""
        for cached, new in zip(self._layers[number], (keys, values), strict=True):
            cached.flatten(0, 1).index_copy_(0, slots, new)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros in all layers."""
        for layer in self._layers:
            layer[:, list(blocks)] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, not whatever memory held: a masked NaN times a share of 0 is still a NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros, which takes seconds per GiB; numpy has the system's own, which take
    # neither time nor memory until a block is used.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(dtype).view(shape)

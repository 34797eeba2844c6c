"""Keys and values of all running sequences, in blocks that sequences share out among them.

A slot holds one token's key and value of one layer; slot ``s`` is entry ``s % block_size`` of
block ``s // block_size``. Which block is whose is the scheduler's business.

In fp8 (e4m3) keys and values lie as they are, without a scale; what is beyond 448, the largest
there is, becomes 448. Its numbers are moved as bytes, for torch does not move them everywhere.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy
import torch
from torch import Tensor

from mixfleet_engine.config import ModelConfig

FP8: Final = torch.float8_e4m3fn
FP8_MAX: Final = 448


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
            new = to_fp8(new) if cached.dtype == FP8 else new
            _movable(cached).flatten(0, 1).index_copy_(0, slots, _movable(new))

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros in all layers."""
        numbers = torch.tensor(blocks).to(self._layers[0].device)
        for layer in self._layers:
            _movable(layer).index_fill_(1, numbers, 0)


def to_fp8(numbers: Tensor) -> Tensor:
    """Return the nearest fp8 numbers; what is too large becomes the largest, a NaN stays one."""
    # Without the clamp some versions of torch make a NaN of what is too large.
    return numbers.clamp(-FP8_MAX, FP8_MAX).to(FP8)


def picked(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of these blocks of a layer's keys or values, in ``dtype``.

    Args:
        cache: ``[num_blocks, block_size, n_kv_heads, head_dim]``.
        blocks: ``[B]`` numbers.
        dtype: What they are computed with; every fp8 number is exact in it.
    """
    return _movable(cache).index_select(0, blocks).view(cache.dtype).to(dtype)


def _movable(numbers: Tensor) -> Tensor:
    """Return the same memory in a dtype that torch copies everywhere; zeros are zeros in both."""
    return numbers.view(torch.uint8) if numbers.dtype == FP8 else numbers


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros, not whatever memory held: a masked NaN times a share of 0 is still a NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros, which takes seconds per GiB; numpy has the system's own, which take
    # neither time nor memory until a block is used.
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(dtype).view(shape)

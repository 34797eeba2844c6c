"""Keys and values of all running sequences, in blocks that sequences share out among them.

A slot holds one token's key and value of one layer; slot ``s`` is entry ``s % block_size`` of
block ``s // block_size``. Which block is whose is the scheduler's business.
"""

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from mixfleet_engine.config import EngineConfig, ModelConfig
from mixfleet_engine.errors import ConfigError

_CPU_CACHE_BYTES = 2 << 30
_CUDA_FREE_SHARE = 0.85
"""Of what the weights leave free; the rest is for activations."""


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


def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block in all layers, keys and values together."""
    return model.kv_values_per_token * block_size * dtype.itemsize


def planned_num_blocks(
    model: ModelConfig, engine: EngineConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Return how many blocks the settings ask for; the weights must be loaded already.

    Without a setting: enough for ``max_batch_size`` sequences of full context, but at most 2 GiB
    on a CPU, or 85 % of what is free on a GPU.

    Raises:
        ConfigError: The memory holds not even one block.
    """
    if engine.num_blocks is not None:
        return engine.num_blocks
    one = block_bytes(model, engine.block_size, dtype)
    if engine.kv_cache_bytes is not None:
        budget = engine.kv_cache_bytes
    else:
        blocks_per_sequence = -(-engine.context_of(model) // engine.block_size)
        budget = min(engine.max_batch_size * blocks_per_sequence * one, _sane_bytes(device))
    if budget < one:
        raise ConfigError(f"{budget} bytes of KV cache hold no block, which takes {one} bytes")
    return budget // one


def _sane_bytes(device: torch.device) -> int:
    if device.type == "cpu":
        return _CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _CUDA_FREE_SHARE)

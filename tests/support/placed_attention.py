"""A back-end in plain torch that also takes batches which lie on a device, as those of GPUs do.

It looks at their numbers on the host, one row after the other: slow, and obvious.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mixfleet_engine.attention import Attention
from mixfleet_engine.batch import Batch, DecodeGroup
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights
from mixfleet_engine.ops.cuda.chunks import PlacedBatch
from mixfleet_engine.ops.reference import ReferenceOps
from mixfleet_engine.ops.torch_backend import TorchBackend
from mixfleet_engine.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class PlacedAttention:
    """Implements `AttentionBlock` with another one's weights."""

    plain: Attention

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        if not isinstance(batch, PlacedBatch):
            return self.plain(x, batch, cache)
        plain, placed = self.plain, batch.placed
        normed = plain.ops.rms_norm(x, plain.norm, plain.norm_eps)
        qkv = plain.wqkv(normed).view(len(x), -1, plain.head_dim)
        # Not `at`: it takes the same tensor for the same positions.
        angles = plain.rotary.cos[batch.positions], plain.rotary.sin[batch.positions]
        turned = plain.ops.rotate(qkv[:, : plain.n_heads + plain.n_kv_heads], *angles)
        q, k = turned[:, : plain.n_heads], turned[:, plain.n_heads :]
        is_real = placed.slots >= 0
        values = qkv[:, -plain.n_kv_heads :]
        cache.write(plain.layer, k[is_real], values[is_real], placed.slots[is_real])
        mixed = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for row in range(len(x)):
            group = _group(placed.block_tables[row], int(placed.starts[row]) + 1, cache.block_size)
            mixed[row] = plain.ops.decode_attention(
                q[row : row + 1], *cache.layer(plain.layer), group
            )
        return plain.wo(mixed.flatten(1))

    def add_to(self, x: Tensor, batch: Batch, cache: KvCache) -> None:
        x += self(x, batch, cache)


class PlacedBackend(TorchBackend):
    """The reference, for decode steps in buckets too."""

    def __init__(self) -> None:
        self._operations = ReferenceOps()
        super().__init__(self._operations)

    def attention(self, weights: AttentionWeights, rotary: RotaryTable) -> PlacedAttention:
        return PlacedAttention(Attention.make(weights, rotary, self._operations))


def _group(block_table: Tensor, length: int, block_size: int) -> DecodeGroup:
    num_blocks = -(-length // block_size)
    return DecodeGroup(
        rows=torch.tensor([0]),
        block_tables=block_table[None, :num_blocks].long(),
        lengths=(length,),
        mask=torch.arange(num_blocks * block_size)[None] < length,
    )

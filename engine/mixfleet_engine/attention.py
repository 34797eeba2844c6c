"""Grouped-query attention of one layer over the paged KV cache, of a back-end's plain operations.

Shape letters: T tokens in the step, D model width, H query heads, G KV heads, A head dimension.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mixfleet_engine.batch import Batch
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights
from mixfleet_engine.ops.door import Linear, Ops
from mixfleet_engine.rotary import RotaryTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention half of layer ``layer``; implements ``AttentionBlock``."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    norm: Tensor
    norm_eps: float
    wqkv: Linear
    """``[T, D] -> [T, (H + 2G) * A]``: queries, then keys, then values."""
    wo: Linear
    rotary: RotaryTable
    ops: Ops

    @classmethod
    def make(cls, weights: AttentionWeights, rotary: RotaryTable, ops: Ops) -> Self:
        """Return the block of these weights; the caller may drop them."""
        return cls(
            layer=weights.layer,
            n_heads=weights.n_heads,
            n_kv_heads=weights.n_kv_heads,
            head_dim=weights.head_dim,
            norm=weights.norm,
            norm_eps=weights.norm_eps,
            wqkv=ops.linear(weights.wqkv),
            wo=ops.linear(weights.wo),
            rotary=rotary,
            ops=ops,
        )

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """Return what the block adds to ``x`` ``[T, D]``, and store keys and values in ``cache``.

        Args:
            x: The running sum, fp32.
            batch: The step.
            cache: Holds every earlier token of the step's sequences.
        """
        normed = self.ops.rms_norm(x, self.norm, self.norm_eps)
        qkv = self.wqkv(normed).view(len(x), -1, self.head_dim)  # [T, H + 2G, A]
        angles = self.rotary.at(batch.positions)
        turned = self.ops.rotate(qkv[:, : self.n_heads + self.n_kv_heads], *angles)
        q, k = turned[:, : self.n_heads], turned[:, self.n_heads :]
        cache.write(self.layer, k, qkv[:, -self.n_kv_heads :], batch.slots)
        return self.wo(self._attend(q, batch, cache).flatten(1))

    def add_to(self, x: Tensor, batch: Batch, cache: KvCache) -> None:
        """Add what :meth:`__call__` returns to ``x`` in place."""
        x += self(x, batch, cache)

    def _attend(self, q: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        keys, values = cache.layer(self.layer)
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)  # [T, H, A]
        for chunk in batch.prefills:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            mixed[rows] = self.ops.prefill_attention(q[rows], keys, values, chunk)
        for group in batch.decodes:
            mixed[group.rows] = self.ops.decode_attention(q[group.rows], keys, values, group)
        return mixed

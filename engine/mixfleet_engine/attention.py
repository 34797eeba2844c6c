"""Grouped-query attention of one layer over the paged KV cache.

Shape letters: T tokens in the step, D model width, H query heads, G KV heads, A head dimension.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mixfleet_engine.batch import Batch
from mixfleet_engine.config import ModelConfig
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.ops.door import Linear, Ops
from mixfleet_engine.weights import WeightLoader


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of layer ``layer``."""

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    wqkv: Linear
    """``[T, D] -> [T, (H + 2G) * A]``: queries, then keys, then values."""
    wo: Linear
    ops: Ops

    @classmethod
    def load(cls, loader: WeightLoader, layer: int, config: ModelConfig, ops: Ops) -> Self:
        """Read the weights of one layer."""
        name = f"layers.{layer}.attention"
        return cls(
            layer=layer,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            wqkv=ops.linear(loader.rows(*(f"{name}.{part}.weight" for part in ("wq", "wk", "wv")))),
            wo=ops.linear(loader.tensor(f"{name}.wo.weight")),
            ops=ops,
        )

    def __call__(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: Batch, cache: KvCache
    ) -> Tensor:
        """Return ``[T, D]`` for ``x`` ``[T, D]``, and store its keys and values in ``cache``.

        Args:
            x: Normalised activations.
            rotary: Cosines and sines of the step's positions, each ``[T, A/2]``.
            batch: The step.
            cache: Holds every earlier token of the step's sequences.
        """
        qkv = self.wqkv(x).view(len(x), -1, self.head_dim)  # [T, H + 2G, A]
        turned = self.ops.rotate(qkv[:, : self.n_heads + self.n_kv_heads], *rotary)
        q, k = turned[:, : self.n_heads], turned[:, self.n_heads :]
        cache.write(self.layer, k, qkv[:, -self.n_kv_heads :], batch.slots)
        return self.wo(self._attend(q, batch, cache).flatten(1))

    def _attend(self, q: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        keys, values = cache.layer(self.layer)
        mixed = torch.empty_like(q, memory_format=torch.contiguous_format)  # [T, H, A]
        for chunk in batch.prefills:
            rows = slice(chunk.first_row, chunk.first_row + chunk.num_rows)
            mixed[rows] = self.ops.prefill_attention(q[rows], keys, values, chunk)
        for group in batch.decodes:
            mixed[group.rows] = self.ops.decode_attention(q[group.rows], keys, values, group)
        return mixed

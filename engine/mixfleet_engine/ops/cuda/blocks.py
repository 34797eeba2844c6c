"""The halves of a layer and the end of the model, as launches of kernels.

Nothing here looks at a number on the device, so all of it can be recorded in a CUDA graph.

Shape letters: see ``ops/door.py``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixfleet_engine.batch import Batch
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.ops.cuda import gemv
from mixfleet_engine.ops.cuda.align import align
from mixfleet_engine.ops.cuda.attention import attend
from mixfleet_engine.ops.cuda.chunks import ChunkPlacer
from mixfleet_engine.ops.cuda.combine import combine, combine_into
from mixfleet_engine.ops.cuda.norm import norm_and_route, rms_norm
from mixfleet_engine.ops.cuda.packed import packed
from mixfleet_engine.ops.cuda.products import Products
from mixfleet_engine.ops.cuda.quant import Rows, quantise_rows, values_of
from mixfleet_engine.ops.cuda.rope_cache import rope_and_cache
from mixfleet_engine.ops.door import RunLayers
from mixfleet_engine.rotary import RotaryTable


@dataclass(frozen=True, slots=True)
class Mixture:
    """The chosen experts' outputs of all tokens, not summed up yet."""

    outputs: Tensor
    """``[T * K, D]``."""
    shares: Tensor
    """``[T, K]`` fp32."""

    def add_to(self, x: Tensor) -> None:
        """Add the weighted sums to ``x`` in place."""
        combine_into(x, self.outputs, self.shares)


def _normed(
    x: Tensor,
    norm: Tensor,
    eps: float,
    products: Products,
    *,
    in_fp8: bool,
    left: Mixture | None = None,
) -> Rows:
    """Return the normed rows of ``x`` with ``left``, which it has afterwards."""
    add, shares = (None, None) if left is None else (left.outputs, left.shares)
    if in_fp8:
        return rms_norm(x, norm, eps, dtype=products.dtype, quantise=True, add=add, shares=shares)
    return rms_norm(x, norm, eps, dtype=products.dtype, add=add, shares=shares)


class CudaAttention:
    """The attention half of a layer; implements ``AttentionBlock``."""

    def __init__(
        self,
        weights: AttentionWeights,
        rotary: RotaryTable,
        products: Products,
        placer: ChunkPlacer,
    ) -> None:
        self._layer = weights.layer
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._rotary = rotary
        self._products = products
        self._placer = placer
        self._wqkv = packed(weights.wqkv)
        self._wo = packed(weights.wo)

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.AttentionBlock`."""
        return self._products.dense(self._mixed(x, batch, cache), self._wo)

    def add_to(self, x: Tensor, batch: Batch, cache: KvCache, left: Mixture | None = None) -> None:
        """See :class:`~mixfleet_engine.ops.door.AttentionBlock`.

        ``left`` by the experts before is added to ``x`` first.
        """
        self._products.dense(self._mixed(x, batch, cache, left), self._wo, add_to=x)

    def _mixed(self, x: Tensor, batch: Batch, cache: KvCache, left: Mixture | None = None) -> Rows:
        """Return what goes into the last product, ``[T, H * A]``."""
        products = self._products
        in_fp8 = products.wants_fp8(self._wqkv, len(x))
        normed = _normed(x, self._norm, self._norm_eps, products, in_fp8=in_fp8, left=left)
        qkv = products.dense(normed, self._wqkv)
        keys, values = cache.layer(self._layer)
        chunks = self._placer.of(batch)
        places = chunks.positions, chunks.slots
        q = rope_and_cache(qkv, self._rotary.cos, self._rotary.sin, *places, keys, values)
        mixed = attend(q, keys, values, chunks).flatten(1)
        return quantise_rows(mixed) if products.wants_fp8(self._wo, len(x)) else mixed


class CudaMoe:
    """The experts' half of a layer; implements ``MoeBlock``."""

    def __init__(self, weights: MoeWeights, products: Products) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._gate = weights.gate.contiguous()
        self._top_k = weights.experts_per_token
        self._products = products
        experts = weights.experts
        self._is_shared = all(expert is experts[0] for expert in experts)
        if self._is_shared:
            experts = experts[:1]
        self._w13 = packed(*(expert.w13 for expert in experts))
        self._w2 = packed(*(expert.w2 for expert in experts))

    def __call__(self, x: Tensor) -> Tensor:
        """See :class:`~mixfleet_engine.ops.door.MoeBlock`."""
        mixture = self.mixture(x)
        return combine(mixture.outputs, mixture.shares)

    def add_to(self, x: Tensor) -> None:
        """See :class:`~mixfleet_engine.ops.door.MoeBlock`."""
        self.mixture(x).add_to(x)

    def mixture(self, x: Tensor) -> Mixture:
        """Return what is to be added to ``x``, for whoever passes over ``x`` next."""
        normed, shares, chosen = norm_and_route(
            x,
            self._norm,
            self._norm_eps,
            self._gate,
            self._top_k,
            dtype=self._products.dtype,
            quantise=self._products.wants_fp8(self._w13, len(x)),
        )
        if self._is_shared:
            # All the chosen are one and the same, so it is computed once.
            h = self._products.dense_up(normed, self._w13)
            outputs = self._products.dense(self._down_rows(h, len(x)), self._w2)
            return Mixture(outputs, shares.sum(dim=1, keepdim=True))
        return Mixture(self._outputs(normed, chosen), shares)

    def _outputs(self, normed: Rows, chosen: Tensor) -> Tensor:
        """Return ``[T * K, D]``."""
        products = self._products
        if isinstance(normed, Tensor) and products.is_few(len(normed)):
            h = gemv.experts_up(normed, self._w13, chosen, dtype=products.dtype)
            return gemv.experts_down(h, self._w2, chosen, dtype=products.dtype)
        num_tokens = len(values_of(normed))
        block_t = products.block_t(num_tokens * self._top_k, self._w13)
        alignment = align(chosen, self._w13.num_matrices, block_t)
        h = products.experts_up(normed, self._w13, alignment)
        return products.experts_down(self._down_rows(h, num_tokens), self._w2, alignment)

    def _down_rows(self, h: Tensor, num_tokens: int) -> Rows:
        return quantise_rows(h) if self._products.wants_fp8(self._w2, num_tokens) else h


class CudaOutput:
    """The last norm and the output matrix; implements ``OutputBlock``."""

    def __init__(self, weights: OutputWeights, products: Products) -> None:
        self._norm = weights.norm
        self._norm_eps = weights.norm_eps
        self._products = products
        self._matrix = packed(weights.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits ``[R, V]`` in fp32 for the running sums ``x`` ``[R, D]``."""
        in_fp8 = self._products.wants_fp8(self._matrix, len(x))
        rows = _normed(x.contiguous(), self._norm, self._norm_eps, self._products, in_fp8=in_fp8)
        return self._products.dense(rows, self._matrix, dtype=torch.float32)


def run_layers(layers: Sequence[tuple[CudaAttention, CudaMoe]]) -> RunLayers:
    """Return what runs layers; each one's norm adds what the experts before have left."""

    def run(x: Tensor, batch: Batch, cache: KvCache) -> None:
        left: Mixture | None = None
        for attention, moe in layers:
            attention.add_to(x, batch, cache, left)
            left = moe.mixture(x)
        if left is not None:
            left.add_to(x)

    return run

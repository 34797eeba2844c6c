"""What the model asks of a back-end.

A back-end makes blocks of weights: half a layer each, from the running sum to what is added to it.
Those that are plain torch share the blocks of ``attention.py``, ``moe.py`` and ``output.py``, and
differ in a few operations: `Ops`.

Shape letters: T tokens in the step, B sequences that decode, H query heads, G KV heads, A head
dimension, D model width, F expert width, K experts per token, N rows of any matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mixfleet_engine.batch import Batch, DecodeGroup, PrefillChunk
from mixfleet_engine.kv_cache import KvCache
from mixfleet_engine.layer_weights import AttentionWeights, MoeWeights, OutputWeights
from mixfleet_engine.quantise import Weight
from mixfleet_engine.rotary import RotaryTable

OutputBlock = Callable[[Tensor], Tensor]
"""Running sums ``[R, D]`` fp32 -> logits ``[R, V]`` fp32."""
Linear = Callable[[Tensor], Tensor]
"""``[T, D]`` -> ``[T, N]``: a matrix in whatever form its back-end likes best."""


class AttentionBlock(Protocol):
    """The attention half of a layer. It stores the step's keys and values in the cache."""

    def __call__(self, x: Tensor, batch: Batch, cache: KvCache) -> Tensor:
        """Return what the block adds to the running sum ``x`` ``[T, D]`` fp32."""
        ...

    def add_to(self, x: Tensor, batch: Batch, cache: KvCache) -> None:
        """Add it to ``x`` in place; ``x`` is contiguous."""
        ...


class MoeBlock(Protocol):
    """The experts' half of a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the block adds to the running sum ``x`` ``[T, D]`` fp32."""
        ...

    def add_to(self, x: Tensor) -> None:
        """Add it to ``x`` in place; ``x`` is contiguous."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One transformer layer: attention, then experts."""

    attention: AttentionBlock
    moe: MoeBlock


RunLayers = Callable[[Tensor, Batch, KvCache], None]
"""Adds what layers add, one after the other, to the running sum ``[T, D]`` fp32 in place."""


def in_turn(layers: Sequence[Layer]) -> RunLayers:
    """Return what runs each block by itself."""

    def run(x: Tensor, batch: Batch, cache: KvCache) -> None:
        for layer in layers:
            layer.attention.add_to(x, batch, cache)
            layer.moe.add_to(x)

    return run


class Backend(Protocol):
    """Makes the blocks of a model."""

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        ...

    def attention(self, weights: AttentionWeights, rotary: RotaryTable) -> AttentionBlock:
        """Return the attention half of a layer; the caller may drop the weights."""
        ...

    def moe(self, weights: MoeWeights) -> MoeBlock:
        """Return the experts' half of a layer; the caller may drop the weights."""
        ...

    def layers(self, layers: Sequence[Layer]) -> RunLayers:
        """Return what runs layers of its own blocks where one rank has them whole."""
        ...

    def output(self, weights: OutputWeights) -> OutputBlock:
        """Return the end of the model; the caller may drop the weights."""
        ...


class Ops(Protocol):
    """The operations that differ. Every method is a pure function of its arguments."""

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        ...

    def linear(self, weight: Weight) -> Linear:
        """Return the product with ``weight`` ``[N, D]``; the caller may drop the original."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return ``x`` ``[T, D]`` at root mean square 1, times ``weight``, in the weight's dtype.

        ``x`` may be wider; all is computed in fp32 and rounded once.
        """
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return ``x`` ``[T, H, A]`` turned by its positions' angles ``[T, A/2]``, in fp32."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """Return ``silu(first half) * second half`` of ``[T, 2F]``."""
        ...

    def prefill_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, chunk: PrefillChunk
    ) -> Tensor:
        """Return causal attention of one sequence's chunk over its whole context.

        Args:
            q: ``[chunk.num_rows, H, A]``.
            keys: The layer's KV cache, ``[num_blocks, block_size, G, A]``; holds the chunk too.
            values: The same for values.
            chunk: Where the sequence stands.
        """
        ...

    def decode_attention(
        self, q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup
    ) -> Tensor:
        """Return attention of one token of each of B sequences over its own context.

        Args:
            q: ``[B, H, A]``.
            keys: The layer's KV cache, ``[num_blocks, block_size, G, A]``; holds the tokens too.
            values: The same for values.
            group: Where the sequences stand.
        """
        ...

    def mix_experts(
        self, x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Linear]
    ) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            x: ``[T, D]``.
            weights: ``[T, K]`` fp32, the share of each chosen expert.
            chosen: ``[T, K]`` expert numbers, distinct in a row.
            experts: One function ``[T, D] -> [T, D]`` each; may be one and the same object.
        """
        ...

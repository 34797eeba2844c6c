"""What the model asks of a back-end: the few operations that are worth doing differently.

Shape letters: T tokens in the step, B sequences that decode, H query heads, G KV heads, A head
dimension, D model width, F expert width, K experts per token, N rows of any matrix.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from mixfleet_engine.batch import DecodeGroup, PrefillChunk

Linear = Callable[[Tensor], Tensor]
"""``[T, D]`` -> ``[T, N]``: a matrix in whatever form its back-end likes best."""


class Ops(Protocol):
    """One back-end. Every method is a pure function of its arguments."""

    @property
    def name(self) -> str:
        """What the setting ``backend`` calls it."""
        ...

    def linear(self, weight: Tensor) -> Linear:
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

"""The end of the model, from the running sum to logits, of a back-end's plain operations.

Shape letters: R rows to sample, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Self

from torch import Tensor

from mixfleet_engine.layer_weights import OutputWeights
from mixfleet_engine.ops.door import Linear, Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputLayer:
    """The last norm and the output matrix; implements ``OutputBlock``."""

    norm: Tensor
    norm_eps: float
    matrix: Linear
    """``[R, D] -> [R, V]``."""
    ops: Ops

    @classmethod
    def make(cls, weights: OutputWeights, ops: Ops) -> Self:
        """Return the block of these weights; the caller may drop them."""
        return cls(
            norm=weights.norm,
            norm_eps=weights.norm_eps,
            matrix=ops.linear(weights.weight),
            ops=ops,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Return logits ``[R, V]`` in fp32 for the running sums ``x`` ``[R, D]``."""
        return self.matrix(self.ops.rms_norm(x, self.norm, self.norm_eps)).float()

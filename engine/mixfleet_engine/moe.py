"""The sparse mixture-of-experts half of a Mixtral layer, of a back-end's plain operations.

Shape letters: T tokens in the step, D model width, F expert width, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.layer_weights import ExpertWeights, MoeWeights
from mixfleet_engine.ops.door import Linear, Ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One SwiGLU feed-forward network, ``[T, D] -> [T, D]``."""

    w13: Linear
    """``[T, D] -> [T, 2F]``: the gate, then what it gates."""
    w2: Linear
    ops: Ops

    def __call__(self, x: Tensor) -> Tensor:
        """Return ``w2(silu(w1 x) * w3 x)``."""
        return self.w2(self.ops.silu_mul(self.w13(x)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """A norm, a router and its experts; implements ``MoeBlock``."""

    norm: Tensor
    norm_eps: float
    gate: Tensor
    """``[E, D]`` fp32."""
    experts: tuple[Expert, ...]
    """E of them; shared experts are E times the same object."""
    experts_per_token: int
    ops: Ops

    @classmethod
    def make(cls, weights: MoeWeights, ops: Ops) -> Self:
        """Return the block of these weights; the caller may drop them."""

        def expert(found: ExpertWeights) -> Expert:
            return Expert(w13=ops.linear(found.w13), w2=ops.linear(found.w2), ops=ops)

        if all(found is weights.experts[0] for found in weights.experts):
            experts = (expert(weights.experts[0]),) * len(weights.experts)
        else:
            experts = tuple(expert(found) for found in weights.experts)
        return cls(
            norm=weights.norm,
            norm_eps=weights.norm_eps,
            gate=weights.gate,
            experts=experts,
            experts_per_token=weights.experts_per_token,
            ops=ops,
        )

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return shares (fp32) and numbers of the chosen experts, each ``[T, K]``."""
        scores = F.linear(x.float(), self.gate)  # [T, E]
        best, chosen = scores.topk(self.experts_per_token, dim=-1)
        # Mixtral normalises over the chosen K, not over all E: softmax after top-k.
        return best.softmax(-1), chosen

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the block adds to the running sum ``x`` ``[T, D]``."""
        normed = self.ops.rms_norm(x, self.norm, self.norm_eps)
        shares, chosen = self.route(normed)
        return self.ops.mix_experts(normed, shares, chosen, self.experts)

    def add_to(self, x: Tensor) -> None:
        """Add what :meth:`__call__` returns to ``x`` in place."""
        x += self(x)

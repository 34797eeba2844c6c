"""The sparse mixture-of-experts feed-forward layer of Mixtral.

Shape letters: T tokens in the step, D model width, F expert width, E experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mixfleet_engine.config import ModelConfig
from mixfleet_engine.ops.door import Linear, Ops
from mixfleet_engine.weights import WeightLoader


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
    """A router and its experts."""

    gate: Tensor
    """``[E, D]`` fp32: the choice of experts should not hang on the rounding of its scores."""
    experts: tuple[Expert, ...]
    """E of them; shared experts are E times the same object."""
    experts_per_token: int
    ops: Ops

    @classmethod
    def load(cls, loader: WeightLoader, layer: int, config: ModelConfig, ops: Ops) -> Self:
        """Read the weights of one layer."""
        name = f"layers.{layer}.feed_forward"

        def load_expert(number: int) -> Expert:
            prefix = f"{name}.experts.{number}"
            return Expert(
                w13=ops.linear(loader.rows(f"{prefix}.w1.weight", f"{prefix}.w3.weight")),
                w2=ops.linear(loader.tensor(f"{prefix}.w2.weight")),
                ops=ops,
            )

        if config.shared_experts:
            experts = (load_expert(0),) * config.num_experts
        else:
            experts = tuple(load_expert(number) for number in range(config.num_experts))
        gate = loader.tensor(f"{name}.gate.weight", torch.float32)
        return cls(gate=gate, experts=experts, experts_per_token=config.experts_per_token, ops=ops)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return shares (fp32) and numbers of the chosen experts, each ``[T, K]``."""
        scores = F.linear(x.float(), self.gate)  # [T, E]
        best, chosen = scores.topk(self.experts_per_token, dim=-1)
        # Mixtral normalises over the chosen K, not over all E: softmax after top-k.
        return best.softmax(-1), chosen

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[T, D]`` for ``x`` ``[T, D]``, in the same dtype."""
        shares, chosen = self.route(x)
        return self.ops.mix_experts(x, shares, chosen, self.experts)

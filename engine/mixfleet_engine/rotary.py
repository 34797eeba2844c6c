"""Rotary position embeddings: the tables of angles.

Always fp32: in bf16 the angles of late positions are off by whole turns.
"""

import torch
from torch import Tensor


class RotaryTable:
    """Cosines and sines of every position; pair ``i`` of a head is (i, i + head_dim / 2)."""

    def __init__(
        self, *, head_dim: int, context_length: int, theta: float, device: torch.device
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents  # [head_dim / 2] turns fast, then slow
        angles = torch.outer(torch.arange(context_length, dtype=torch.float32), frequencies)
        self._cos = angles.cos().to(device)
        self._sin = angles.sin().to(device)
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def cos(self) -> Tensor:
        """``[context_length, head_dim / 2]`` fp32."""
        return self._cos

    @property
    def sin(self) -> Tensor:
        """``[context_length, head_dim / 2]`` fp32."""
        return self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each ``[T, head_dim / 2]`` fp32, of ``positions`` ``[T]``."""
        # Every layer of a step asks for the same positions.
        if self._last is None or self._last[0] is not positions:
            self._last = positions, (self._cos[positions], self._sin[positions])
        return self._last[1]

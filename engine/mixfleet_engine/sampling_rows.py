"""The rows of logits that a step samples from, each with its settings.

Shape letters: R rows, V vocabulary, B blocks of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import torch
from torch import Tensor

from mixfleet_engine.ranking import block_maxima
from mixfleet_engine.request import SamplingParams
from mixfleet_engine.uniform import uniform

COLDEST: Final = torch.finfo(torch.float32).tiny
"""Temperatures below it would divide by 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """R rows on one device."""

    logits: Tensor
    """``[R, V]`` fp32."""
    maxima: Tensor
    """``[R, B]``, their block maxima."""
    params: Sequence[SamplingParams]
    """R settings."""
    positions: Sequence[int]
    """R numbers of answer tokens before the sampled one."""

    @classmethod
    def of(cls, logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Self:
        """Return the rows of these logits."""
        maxima = block_maxima(logits)
        return cls(logits=logits, maxima=maxima, params=params, positions=positions)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.shape[-1]

    @property
    def best(self) -> Tensor:
        """``[R, 1]`` highest logits; not finite where the model's numbers have gone wrong."""
        return self.maxima.amax(-1, keepdim=True)

    def select(self, numbers: Sequence[int]) -> Self:
        """Return the rows of these numbers, rising: themselves if that is all of them."""
        if len(numbers) == len(self.params):
            return self
        index = torch.tensor(numbers, device=self.logits.device)
        return type(self)(
            logits=self.logits.index_select(0, index),
            maxima=self.maxima.index_select(0, index),
            params=[self.params[number] for number in numbers],
            positions=[self.positions[number] for number in numbers],
        )

    def temperatures(self) -> Tensor:
        """Return ``[R, 1]`` fp32, above 0."""
        return self.column([max(p.temperature, COLDEST) for p in self.params], torch.float32)

    def uniforms(self) -> Tensor:
        """Return ``[R, 1]`` fp64 random numbers of each row's seed and position."""
        pairs = zip(self.params, self.positions, strict=True)
        return self.column([uniform(p.seed, position) for p, position in pairs], torch.float64)

    def column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return R values as ``[R, 1]`` beside the logits."""
        return torch.tensor(values, dtype=dtype, device=self.logits.device)[:, None]

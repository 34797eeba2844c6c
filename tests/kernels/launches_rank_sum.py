"""Launches of the sum over ranks at the shapes of Mixtral 8x7B and 8x22B."""

import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.rank_sum import add_gathered, add_spread

T = 64
WORLDS = (2, 4, 8)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches() -> None:
    for D in (4096, 6144):
        x = empty(T, D, dtype=torch.float32)
        for N in WORLDS:
            add_gathered(x, empty(N, T, D))
            add_spread(x, [empty(T, D) for _ in range(N)])

"""Launches of the norm at the shapes of Mixtral 8x7B and 8x22B."""

import torch
from torch import Tensor

from mixfleet_engine.ops.cuda.norm import norm_and_route, rms_norm

WIDTHS = (4096, 6144)
T, E, K = 64, 8, 2
EPS = 1e-5


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches() -> None:
    for D in WIDTHS:
        x, weight = empty(T, D, dtype=torch.float32), empty(D)
        rms_norm(x, weight, EPS, dtype=torch.bfloat16)
        rms_norm(x, weight, EPS, dtype=torch.bfloat16, add=empty(T, D))
        shares = empty(T, K, dtype=torch.float32)
        rms_norm(x, weight, EPS, dtype=torch.bfloat16, add=empty(T * K, D), shares=shares)
        gate = empty(E, D, dtype=torch.float32)
        norm_and_route(x, weight, EPS, gate, K, dtype=torch.bfloat16)


def launches_fp8() -> None:
    """For sm_89 and newer only."""
    for D in WIDTHS:
        x, weight = empty(T, D, dtype=torch.float32), empty(D)
        shares = empty(T, K, dtype=torch.float32)
        rms_norm(
            x, weight, EPS, dtype=torch.bfloat16, quantise=True, add=empty(T * K, D), shares=shares
        )
        gate = empty(E, D, dtype=torch.float32)
        norm_and_route(x, weight, EPS, gate, K, dtype=torch.bfloat16, quantise=True)

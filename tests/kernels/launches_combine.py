"""Launches of the sum over experts at the shapes of Mixtral 8x7B and 8x22B."""

import torch

from mixfleet_engine.ops.cuda.combine import combine, combine_into


def launches() -> None:
    T, K = 64, 2
    for D in (4096, 6144):
        y = torch.empty(T * K, D, dtype=torch.bfloat16, device="meta")
        shares = torch.empty(T, K, dtype=torch.float32, device="meta")
        combine(y, shares)
        combine_into(torch.empty(T, D, dtype=torch.float32, device="meta"), y, shares)

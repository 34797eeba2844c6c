"""Launches of what lies between an expert's products, for Mixtral 8x7B and 8x22B."""

import torch

from mixfleet_engine.ops.cuda.swiglu import silu_mul

P = 256


def launches() -> None:
    for F in (14336, 16384):
        x = torch.empty(P, 2 * F, dtype=torch.bfloat16, device="meta")
        silu_mul(x)
        silu_mul(x, sorted_slots=torch.empty(P, dtype=torch.int32, device="meta"), num_pairs=128)


def launches_fp8() -> None:
    """For sm_89 and newer only."""
    for F in (14336, 16384):
        x = torch.empty(P, 2 * F, dtype=torch.bfloat16, device="meta")
        slots = torch.empty(P, dtype=torch.int32, device="meta")
        silu_mul(x, quantise=True, sorted_slots=slots, num_pairs=128)

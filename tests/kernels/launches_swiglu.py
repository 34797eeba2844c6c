"""Launches of what lies between an expert's products, for Mixtral 8x7B and 8x22B."""

import torch

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.swiglu import silu_mul

P, BLOCK_T = 256, 16
ALIGNED = Alignment(
    sorted_slots=torch.empty(P, dtype=torch.int32, device="meta"),
    tile_experts=torch.empty(P // BLOCK_T, dtype=torch.int32, device="meta"),
    num_pairs=128,
    top_k=2,
    block_t=BLOCK_T,
)


def launches() -> None:
    for F in (14336, 16384):
        x = torch.empty(P, 2 * F, dtype=torch.bfloat16, device="meta")
        silu_mul(x)
        silu_mul(x, alignment=ALIGNED)


def launches_fp8() -> None:
    """For sm_89 and newer only."""
    for F in (14336, 16384):
        x = torch.empty(P, 2 * F, dtype=torch.bfloat16, device="meta")
        silu_mul(x, quantise=True, alignment=ALIGNED)

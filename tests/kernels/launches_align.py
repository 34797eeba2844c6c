"""Launches of the alignment: a single decode, the most pairs of one program, a long prefill."""

import torch

from mixfleet_engine.ops.cuda.align import align


def launches() -> None:
    for T, block_t in ((1, 16), (64, 16), (512, 64), (8192, 128)):
        align(torch.empty(T, 2, dtype=torch.int32, device="meta"), 8, block_t)
    align(torch.empty(1024, 8, dtype=torch.int32, device="meta"), 64, 64)

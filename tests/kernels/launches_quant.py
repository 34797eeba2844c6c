"""Launches of the quantisation of rows, for Mixtral 8x7B and 8x22B; sm_89 and newer only."""

import torch

from mixfleet_engine.ops.cuda.quant import quantise_rows


def launches_fp8() -> None:
    for width in (4096, 6144, 14336, 16384):
        quantise_rows(torch.empty(64, width, dtype=torch.bfloat16, device="meta"))

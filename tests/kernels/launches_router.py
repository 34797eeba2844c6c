"""Launches of the router at the shapes of Mixtral 8x7B and 8x22B, and at its largest."""

import torch

from mixfleet_engine.ops.cuda.router import route


def launches() -> None:
    for D, E, K in ((4096, 8, 2), (6144, 8, 2), (6144, 64, 8)):
        normed = torch.empty(64, D, dtype=torch.bfloat16, device="meta")
        route(normed, torch.empty(E, D, dtype=torch.float32, device="meta"), K)

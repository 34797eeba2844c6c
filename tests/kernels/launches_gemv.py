"""Products of few tokens at Mixtral's true shapes, to be compiled: see `support.compiling`."""

import torch

from kernels.launches_gemm import META, weight
from mixfleet_engine.ops.cuda.gemv import dense, experts_down, experts_up
from mixfleet_engine.ops.cuda.packed import Form


def launch(form: Form, dim: int, hidden: int) -> None:
    """The products of a layer for one token."""
    x = torch.empty(1, dim, dtype=torch.bfloat16, device=META)
    h = torch.empty(2, hidden, dtype=torch.bfloat16, device=META)
    chosen = torch.empty(1, 2, dtype=torch.int32, device=META)
    dense(x, weight(form, 1, dim, dim), add_to=torch.empty(1, dim, device=META))
    experts_up(x, weight(form, 8, 2 * hidden, dim), chosen, dtype=torch.bfloat16)
    experts_down(h, weight(form, 8, dim, hidden), chosen, dtype=torch.bfloat16)


def launches() -> None:
    launch("int4", 4096, 14336)
    launch("int8", 6144, 16384)
    launch("plain", 4096, 14336)


def launches_fp8() -> None:
    """For sm_89 and newer only."""
    launch("fp8", 4096, 14336)

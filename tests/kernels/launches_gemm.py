"""The products of Mixtral's true shapes, to be compiled: see `support.compiling`."""

from dataclasses import replace

import torch

from mixfleet_engine.ops.cuda.alignment import Alignment
from mixfleet_engine.ops.cuda.gemm import dense, experts_down, experts_up
from mixfleet_engine.ops.cuda.packed import WORDS, Form, PackedWeight
from mixfleet_engine.ops.cuda.quant import Rows, empty_rows
from mixfleet_engine.ops.cuda.tiles import default_tiles
from mixfleet_engine.weight_formats import INT4_GROUP

META = torch.device("meta")
SHARED = 163 << 10
"""What a program may have on compute capability 8.0."""
TYPES = {"plain": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def weight(form: Form, count: int, n: int, k: int) -> PackedWeight:
    groups = k // INT4_GROUP
    stored = (count, n, groups * WORDS.get(form, INT4_GROUP))
    return PackedWeight(
        form=form,
        n=n,
        k=k,
        values=torch.empty(stored, dtype=TYPES.get(form, torch.int16), device=META),
        scales=None
        if form == "plain"
        else torch.empty((count, groups, n) if form == "int4" else (count, n), device=META),
        zeros=None,
    )


def rows(form: Form, num_rows: int, k: int) -> Rows:
    if form == "fp8":
        return empty_rows(num_rows, k, META)
    return torch.empty(num_rows, k, dtype=torch.bfloat16, device=META)


def launch(form: Form, block_t: int, dim: int, hidden: int) -> None:
    """A layer's products for about as many tokens as make tiles of ``block_t``."""
    num_tokens = 4 * block_t
    tiles = default_tiles(form, block_t, swiglu=False, shared_bytes=SHARED)
    up = default_tiles(form, block_t, swiglu=True, shared_bytes=SHARED)
    alignment = Alignment(
        sorted_slots=torch.empty(16 * block_t, dtype=torch.int32, device=META),
        tile_experts=torch.empty(16, dtype=torch.int32, device=META),
        num_pairs=2 * num_tokens,
        top_k=2,
        block_t=block_t,
    )
    x, h = rows(form, num_tokens, dim), rows(form, 2 * num_tokens, hidden)
    total = torch.empty(num_tokens, dim, device=META)
    dense(x, weight(form, 1, dim + 2048, dim), tiles, dtype=torch.bfloat16)
    dense(x, weight(form, 1, dim, dim), tiles, add_to=total)
    experts_up(x, weight(form, 8, 2 * hidden, dim), alignment, up, dtype=torch.bfloat16)
    experts_down(h, weight(form, 8, dim, hidden), alignment, tiles, dtype=torch.bfloat16)


def int4_decode() -> None:
    launch("int4", 16, 4096, 14336)
    launch("int4", 32, 6144, 16384)


def int4_prefill() -> None:
    launch("int4", 64, 4096, 14336)


def fp8() -> None:
    launch("fp8", 32, 4096, 14336)
    launch("fp8", 128, 4096, 14336)


def int8() -> None:
    launch("int8", 16, 4096, 14336)
    launch("int8", 64, 4096, 14336)


def plain() -> None:
    launch("plain", 16, 4096, 14336)
    launch("plain", 128, 4096, 14336)


def uncommon() -> None:
    """int4 with zero points, and in fp16, where there is no PTX for it."""
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device=META)
    tiles = default_tiles("int4", 16, swiglu=False, shared_bytes=SHARED)
    plain = weight("int4", 1, 4096, 4096)
    assert plain.scales is not None
    dense(x, replace(plain, zeros=torch.empty_like(plain.scales)), tiles, dtype=torch.bfloat16)
    dense(x.half(), plain, tiles, dtype=torch.float16)


def fp8_weights_only() -> None:
    """For sm_89 and newer only, like `fp8`."""
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device=META)
    tiles = default_tiles("fp8", 16, swiglu=False, shared_bytes=SHARED)
    dense(x, weight("fp8", 1, 4096, 4096), tiles, dtype=torch.bfloat16)

"""How a matrix kernel cuts its work into tiles, and which cuts are worth a try.

All of them give the same bits: what one number is the sum of is walked through in steps of 128
inputs whatever the tile, by the same matrix instruction. So a tuner may choose by time alone.

Shape letters: N output width, T rows of tokens.
"""

from dataclasses import dataclass, replace
from typing import Final

import triton

from mixfleet_engine.ops.cuda.packed import Form
from mixfleet_engine.weight_formats import INT4_GROUP

LEAST_ROWS: Final = 16
"""Fewer columns a matrix instruction does not take everywhere."""
MOST_ROWS: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """One way to cut a product."""

    block_n: int
    """Rows of weights of a program, 64 for each 4 warps: with swiglu so many of both matrices."""
    block_t: int
    """Tokens of a program."""
    group: int
    """Blocks of weight rows that the programs of one token tile go through before the next tile's
    programs: the tokens stay in L2 meanwhile."""
    num_warps: int
    num_stages: int
    """Tiles on their way from memory at the same time."""
    ptx: bool = True
    """Whether int4 numbers are taken apart by instructions of our own choice."""


def rows_per_tile(num_rows: int) -> int:
    """Return how many tokens a tile should have that are to hold ``num_rows`` on average."""
    return min(MOST_ROWS, max(LEAST_ROWS, triton.next_power_of_2(num_rows)))


def default_tiles(form: Form, block_t: int, *, swiglu: bool, shared_bytes: int) -> Tiles:
    """Return a way that is never bad: many bytes on their way for few tokens, few for many.

    Args:
        form: Of the weights.
        block_t: Tokens of a program.
        swiglu: Whether a program has rows of two matrices.
        shared_bytes: What a program may have of a multiprocessor's shared memory.
    """
    many = block_t == MOST_ROWS
    wide = many and not (swiglu and form == "plain")
    tiles = Tiles(
        block_n=128 if wide else 64,
        block_t=block_t,
        group=8,
        num_warps=8 if wide else 4,
        num_stages=3 if many else {"plain": 3, "fp8": 4, "int8": 4, "int4": 5}[form],
    )
    most = shared_bytes // stage_bytes(form, tiles, swiglu=swiglu)
    return replace(tiles, num_stages=max(2, min(tiles.num_stages, most)))


def stage_bytes(form: Form, tiles: Tiles, *, swiglu: bool) -> int:
    """Return the shared memory that one stage of a product takes."""
    weight_bits, row_bytes = {"plain": (16, 2), "fp8": (8, 1), "int8": (8, 2), "int4": (4, 2)}[form]
    rows = tiles.block_n * (2 if swiglu else 1)
    return INT4_GROUP * (rows * weight_bits // 8 + tiles.block_t * row_bytes)


def candidates(form: Form, block_t: int, *, swiglu: bool, shared_bytes: int) -> tuple[Tiles, ...]:
    """Return the ways to try, the default first; arguments as for `default_tiles`."""
    first = default_tiles(form, block_t, swiglu=swiglu, shared_bytes=shared_bytes)
    found = [
        first,
        replace(first, num_stages=first.num_stages + 1),
        replace(first, num_stages=first.num_stages - 1),
        replace(first, group=1 if block_t < MOST_ROWS else 16),
    ]
    if first.block_n == 128:
        found.append(replace(first, block_n=64, num_warps=4))
    else:
        found.append(replace(first, block_n=128, num_warps=8))
    if form == "int4":
        found.append(replace(first, ptx=False))
    return tuple(
        tiles
        for tiles in found
        if tiles.num_stages > 1
        and tiles.num_stages * stage_bytes(form, tiles, swiglu=swiglu) <= shared_bytes
    )

"""How a matrix kernel cuts its work into tiles, and which cuts are worth a try.

All of them give the same bits: what one number is the sum of is walked through in steps of 128
inputs whatever the tile, by the same matrix instruction. So a tuner may choose by time alone.

Shape letters: N output width, T rows of tokens.
"""

from dataclasses import dataclass, replace
from typing import Final

import triton

from mixfleet_engine.ops.cuda.packed import Form

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


def default_tiles(form: Form, block_t: int) -> Tiles:
    """Return a way that is never bad: many bytes on their way for few tokens, few for many."""
    if block_t == MOST_ROWS:
        return Tiles(block_n=128, block_t=block_t, group=8, num_warps=8, num_stages=3)
    stages = {"plain": 3, "fp8": 4, "int8": 4, "int4": 5}[form]
    return Tiles(block_n=64, block_t=block_t, group=8, num_warps=4, num_stages=stages)


def candidates(form: Form, block_t: int) -> tuple[Tiles, ...]:
    """Return the ways to try, the default first."""
    first = default_tiles(form, block_t)
    deeper = replace(first, num_stages=first.num_stages + 1)
    flatter = replace(first, num_stages=first.num_stages - 1)
    found = [first, deeper, flatter]
    if block_t == MOST_ROWS:
        found.append(replace(first, block_n=64, num_warps=4))
        found.append(replace(first, group=16))
    else:
        found.append(replace(first, block_n=128, num_warps=8, num_stages=first.num_stages - 1))
        found.append(replace(first, group=1))
    if form == "int4":
        found.append(replace(first, ptx=False))
    return tuple(found)

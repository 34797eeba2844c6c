"""How a matrix kernel cuts its work into tiles, and which cuts are worth a try.

All of them give the same bits: what one number is the sum of is walked through in the same steps
whatever the tile, by the same matrix instruction. So a tuner may choose by time alone.

Shape letters: N output width, T rows of tokens.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import triton

from mixfleet_engine.ops.cuda.packed import Form
from mixfleet_engine.weight_formats import INT4_GROUP

LEAST_ROWS: Final = 16
"""For fewer columns Triton takes another instruction, and an older device has none."""
MOST_ROWS: Final[dict[Form, int]] = {"plain": 128, "fp8": 128, "int8": 64, "int4": 64}
"""Tokens of the largest tile. Numbers taken apart live in registers, which leaves fewer for sums:
128 tokens of two matrices would spill."""
STEP: Final[dict[Form, int]] = {"plain": 64, "fp8": 128, "int8": 128, "int4": INT4_GROUP}
"""Inputs of one step along K: 128 bytes of a row, or a group. Fixed, for it is part of the bits."""
_ON_THEIR_WAY: Final = 40 << 10
"""Bytes of weights that one program asks for ahead: 132 times that keeps an H100's memory busy even
if a multiprocessor has no second program."""


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
    """Tiles on their way from memory at the same time, of ``unroll`` steps each."""
    unroll: int = 1
    """Steps along K between two barriers."""
    ptx: bool = True
    """Whether int4 and int8 numbers are taken apart by instructions of our own choice."""


def rows_per_tile(num_rows: int, form: Form) -> int:
    """Return how many tokens a tile is to have that should hold ``num_rows``."""
    return min(MOST_ROWS[form], max(LEAST_ROWS, triton.next_power_of_2(num_rows)))


def default_tiles(form: Form, block_t: int, *, swiglu: bool, shared_bytes: int) -> Tiles:
    """Return a way that is never bad: many bytes on their way for few tokens, few for many.

    Args:
        form: Of the weights.
        block_t: Tokens of a program.
        swiglu: Whether a program has rows of two matrices.
        shared_bytes: What a program may have of a multiprocessor's shared memory.
    """
    if block_t >= MOST_ROWS[form]:
        return _for_many(form, block_t, swiglu=swiglu, shared_bytes=shared_bytes)
    tiles = Tiles(block_n=64, block_t=block_t, group=8, num_warps=4, num_stages=3, unroll=2)
    room = shared_bytes // 2  # for a second program beside it
    taken_apart = form in ("int4", "int8")
    if not taken_apart or tiles.num_stages * stage_bytes(form, tiles, swiglu=swiglu) > room:
        tiles = replace(tiles, num_stages=4, unroll=1)
    weights = stage_bytes(form, replace(tiles, block_t=0), swiglu=swiglu)
    wanted = max(tiles.num_stages, 1 + _ON_THEIR_WAY // weights)
    fitting = room // stage_bytes(form, tiles, swiglu=swiglu)
    return replace(tiles, num_stages=max(2, min(wanted, fitting)))


def _for_many(form: Form, block_t: int, *, swiglu: bool, shared_bytes: int) -> Tiles:
    wide = not (swiglu and form == "plain")
    tiles = Tiles(
        block_n=128 if wide else 64,
        block_t=block_t,
        group=8,
        num_warps=8 if wide else 4,
        num_stages=2,
    )
    fitting = shared_bytes // stage_bytes(form, tiles, swiglu=swiglu)
    return replace(tiles, num_stages=max(2, min(4, fitting)))


def stage_bytes(form: Form, tiles: Tiles, *, swiglu: bool) -> int:
    """Return the shared memory that one stage of a product takes, scales included."""
    weight_bits, row_bytes = {"plain": (16, 2), "fp8": (8, 1), "int8": (8, 2), "int4": (4, 2)}[form]
    rows = tiles.block_n * (2 if swiglu else 1)
    scales = 4 * rows if form == "int4" else 0
    step = STEP[form] * (rows * weight_bits // 8 + tiles.block_t * row_bytes) + scales
    return step * tiles.unroll


@cache
def candidates(form: Form, block_t: int, *, swiglu: bool, shared_bytes: int) -> tuple[Tiles, ...]:
    """Return the ways to try, the default first; arguments as for `default_tiles`."""
    first = default_tiles(form, block_t, swiglu=swiglu, shared_bytes=shared_bytes)
    stages = first.num_stages
    other_n = replace(first, block_n=64, num_warps=4)
    if first.block_n == 64:
        other_n = replace(first, block_n=128, num_warps=8)
    other_unroll = replace(first, unroll=2, num_stages=stages // 2 + 1)
    if first.unroll == 2:
        other_unroll = replace(first, unroll=1, num_stages=2 * stages - 2)
    found = [first, replace(first, num_stages=stages - 1), replace(first, num_stages=stages + 1)]
    found.append(other_unroll)
    if block_t >= MOST_ROWS[form]:
        found += [replace(first, group=group) for group in (4, 16)]
    else:
        found.append(replace(first, num_stages=stages // 2))
    found += [replace(other_n, num_stages=number) for number in (stages // 2, stages)]
    fitting = (
        tiles
        for tiles in found
        if tiles.num_stages > 1
        and tiles.num_stages * stage_bytes(form, tiles, swiglu=swiglu) <= shared_bytes
    )
    return tuple(dict.fromkeys(fitting))

"""Groups the (token, choice) pairs of a step by expert, each group in whole tiles.

Counts and places are whole numbers without atomics: pairs of one expert keep their order, and the
result is the same however many programs make it. A program has a block of pairs; it needs to know
only how many pairs of each expert stand in the blocks before its own. For one block, all that a
step of decodes has, it is a single launch, for more a second one counts first. Plain torch would be
a dozen launches.

Shape letters: N pairs (T tokens times K experts per token), E experts, B slots of a tile, P slots.
It reads and writes a few bytes per pair: 8192 tokens of a prefill are 64 KiB, read twice.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

import mixfleet_engine.ops.cuda.dialect  # noqa: F401  (comes before any kernel)
from mixfleet_engine.ops.cuda.alignment import Alignment

HITS: Final = 8192
"""Numbers of a block's table of pairs and experts: 1024 pairs of 8 experts."""


def num_slots(num_pairs: int, num_experts: int, block_t: int) -> int:
    """Return P: how many slots N pairs can need at most, whatever they chose.

    An expert with ``c`` pairs takes ``1 + (c - 1) // B`` tiles. So most are taken when as many
    experts as can be have a pair each, and the rest of the pairs fills tiles alone. 2 pairs, 8
    experts, tiles of 16: 2 tiles. 16 pairs: 8 + (16 - 8) // 16 = 8 tiles.
    """
    hit = min(num_pairs, num_experts)
    return (hit + (num_pairs - hit) // block_t) * block_t


def align(
    chosen: Tensor, num_experts: int, block_t: int, *, block_pairs: int | None = None
) -> Alignment:
    """Return the alignment of ``chosen`` ``[T, K]`` int32, numbers from 0 to below E.

    Args:
        chosen: A row's numbers are distinct.
        num_experts: E.
        block_t: B, a power of two.
        block_pairs: Pairs of a program, a power of two; None: what suits E. For tests.
    """
    assert chosen.is_contiguous()
    num_pairs, experts = chosen.numel(), triton.next_power_of_2(num_experts)
    slots = num_slots(num_pairs, num_experts, block_t)
    sorted_slots = torch.empty(slots, dtype=torch.int32, device=chosen.device)
    tile_experts = torch.empty(slots // block_t, dtype=torch.int32, device=chosen.device)
    if num_pairs:
        pairs = block_pairs or max(16, HITS // experts)
        pairs = min(pairs, max(16, triton.next_power_of_2(num_pairs)))
        blocks = triton.cdiv(num_pairs, pairs)
        counts = None
        if blocks > 1:
            counts = torch.empty(blocks, experts, dtype=torch.int32, device=chosen.device)
            _count[(blocks,)](chosen, counts, num_pairs, E_PAD=experts, BLOCK_N=pairs, num_warps=4)
        _place[(blocks,)](
            chosen,
            counts,
            sorted_slots,
            tile_experts,
            num_pairs,
            slots,
            blocks,
            E_PAD=experts,
            BLOCK_N=pairs,
            BLOCKS_PAD=triton.next_power_of_2(blocks),
            BLOCK_P=max(block_t, triton.next_power_of_2(triton.cdiv(slots, blocks))),
            BLOCK_T=block_t,
            num_warps=max(1, min(8, pairs * experts // 512)),
        )
    return Alignment(
        sorted_slots=sorted_slots,
        tile_experts=tile_experts,
        num_pairs=num_pairs,
        top_k=chosen.shape[1],
        block_t=block_t,
    )


@triton.jit
def _hits(chosen_ptr, pairs, num_pairs, E_PAD: tl.constexpr):
    """Return ``[pairs, E_PAD]``: 1 where a pair is the expert's."""
    chosen = tl.load(chosen_ptr + pairs, mask=pairs < num_pairs, other=-1)
    return (chosen[:, None] == tl.arange(0, E_PAD)[None, :]).to(tl.int32)


@triton.jit
def _count(chosen_ptr, counts_ptr, num_pairs, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr):
    block = tl.program_id(0)
    hits = _hits(chosen_ptr, block * BLOCK_N + tl.arange(0, BLOCK_N), num_pairs, E_PAD)
    tl.store(counts_ptr + block * E_PAD + tl.arange(0, E_PAD), tl.sum(hits, axis=0))


@triton.jit
def _place(
    chosen_ptr,
    counts_ptr,
    slots_ptr,
    tile_experts_ptr,
    num_pairs,
    num_slots,
    num_blocks,
    E_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_PAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Place a block's pairs, and fill its share of the slots and tiles, which may be others'."""
    block = tl.program_id(0)
    pairs = block * BLOCK_N + tl.arange(0, BLOCK_N)
    hits = _hits(chosen_ptr, pairs, num_pairs, E_PAD)
    if counts_ptr is None:
        before = tl.zeros([E_PAD], dtype=tl.int32)
        counts = tl.sum(hits, axis=0)
    else:
        blocks = tl.arange(0, BLOCKS_PAD)[:, None]
        all_counts = tl.load(
            counts_ptr + blocks * E_PAD + tl.arange(0, E_PAD)[None, :],
            mask=blocks < num_blocks,
            other=0,
        )
        before = tl.sum(tl.where(blocks < block, all_counts, 0), axis=0)
        counts = tl.sum(all_counts, axis=0)
    padded = (counts + BLOCK_T - 1) // BLOCK_T * BLOCK_T
    ends = tl.cumsum(padded, axis=0)  # of each expert's slots
    starts = ends - padded
    ranks = before[None, :] + tl.cumsum(hits, axis=0) - 1
    places = tl.sum(hits * (starts[None, :] + ranks), axis=1)
    tl.store(slots_ptr + places, pairs, mask=pairs < num_pairs)

    slots = block * BLOCK_P + tl.arange(0, BLOCK_P)
    taken = (slots[:, None] >= starts[None, :]) & (slots[:, None] < (starts + counts)[None, :])
    padding = tl.sum(taken.to(tl.int32), axis=1) == 0
    fill = tl.zeros_like(slots) + num_pairs
    tl.store(slots_ptr + slots, fill, mask=padding & (slots < num_slots))

    tiles = block * (BLOCK_P // BLOCK_T) + tl.arange(0, BLOCK_P // BLOCK_T)
    ended = tl.sum((tiles[:, None] * BLOCK_T >= ends[None, :]).to(tl.int32), axis=1)
    experts = tl.where(tiles * BLOCK_T < tl.sum(padded, axis=0), ended, -1)
    tl.store(tile_experts_ptr + tiles, experts, mask=tiles * BLOCK_T < num_slots)

"""The paged attention kernel on its own, whose fp32 results hide no bit behind a later rounding."""

import math

import pytest
import torch
from torch import Tensor

from mixfleet_engine.batch import ChunkTable
from mixfleet_engine.kv_cache import KvCache
from support.native_attention import (
    AttentionLayer,
    Heads,
    PagedKernel,
    reference_attention,
    relative_error,
    store,
)
from support.native_cases import random

HEADS = [
    Heads(queries=9, kv=3, dim=64),
    Heads(queries=8, kv=2, dim=128),
    Heads(queries=6, kv=1, dim=16),
    Heads(queries=2, kv=2, dim=32),
    Heads(queries=14, kv=2, dim=48),
]
SHARES_ROUNDED = 3e-3
"""Shares of softmax have 8 bits; over many positions their errors cancel in part."""


class Sequence:
    """Turned queries, keys and values of a whole sequence, stored in blocks of its own."""

    def __init__(self, heads: Heads, length: int, *, seed: int = 0, size: float = 1) -> None:
        self.heads, self.length = heads, length
        self.q = random(length, heads.queries, heads.dim, seed=seed) * size
        self.k = random(length, heads.kv, heads.dim, seed=seed + 1) * size
        self.v = random(length, heads.kv, heads.dim, seed=seed + 2)

    def stored(self, cache: KvCache, first_block: int = 0) -> list[int]:
        blocks = -(-self.length // cache.block_size)
        table = list(range(first_block, first_block + blocks))
        store(cache, self.k, self.v, table)
        return table

    def cache(self, block_size: int = 16, *, stale: float = 0.0) -> KvCache:
        blocks = -(-self.length // block_size)
        return AttentionLayer(self.heads).cache(blocks, block_size, stale=stale)


def chunk_table(*chunks: tuple[int, int, list[int]]) -> ChunkTable:
    """Return the table of chunks of (rows, start, block table)."""

    def int32(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    return ChunkTable(
        first_rows=int32([sum(c[0] for c in chunks[:i]) for i in range(len(chunks))]),
        num_rows=int32([rows for rows, _, _ in chunks]),
        starts=int32([start for _, start, _ in chunks]),
        table_offsets=int32([sum(len(c[2]) for c in chunks[:i]) for i in range(len(chunks))]),
        tables=int32([block for _, _, table in chunks for block in table]),
    )


def whole(sequence: Sequence, threads: int = 1, *, stale: float = 0.0) -> Tensor:
    """Return all rows of a sequence, computed as one chunk."""
    cache = sequence.cache(stale=stale)
    chunks = chunk_table((sequence.length, 0, sequence.stored(cache)))
    return PagedKernel(sequence.heads)(sequence.q, chunks, cache, threads)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Return whether all bits are the same, of zeros and NaNs too."""
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 255, 256, 257, 300])
def test_all_rows_match_the_reference(heads: Heads, length: int) -> None:
    sequence = Sequence(heads, length)
    expected = reference_attention(sequence.q, sequence.k, sequence.v)
    assert relative_error(whole(sequence), expected) < SHARES_ROUNDED


def test_scores_that_would_overflow_an_exponential_give_finite_shares() -> None:
    sequence = Sequence(HEADS[0], 280, size=30)
    expected = reference_attention(sequence.q, sequence.k, sequence.v)
    assert relative_error(whole(sequence), expected) < SHARES_ROUNDED


def test_a_sharp_score_in_an_earlier_part_outweighs_a_whole_later_part() -> None:
    sequence = Sequence(HEADS[0], 600, size=0.1)
    sequence.k[100] = 50 * sequence.q[-1].view(3, 3, 64).mean(1)
    sequence.q[-1] = sequence.k[100].repeat_interleave(3, dim=0)
    expected = sequence.v[100].bfloat16().float().repeat_interleave(3, dim=0)
    torch.testing.assert_close(whole(sequence)[-1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 16])
def test_each_row_as_a_decode_has_the_bits_of_the_prefill(heads: Heads, threads: int) -> None:
    sequence = Sequence(heads, 530)
    expected = whole(sequence)
    cache = sequence.cache()
    table = sequence.stored(cache)
    kernel = PagedKernel(heads)
    for row in [0, 1, 14, 15, 16, 17, 200, 254, 255, 256, 257, 511, 512, 513, 529]:
        chunks = chunk_table((1, row, table[: row // 16 + 1]))
        found = kernel(sequence.q[row : row + 1], chunks, cache, threads)
        assert same_bits(found, expected[row : row + 1]), row


@pytest.mark.parametrize("size", [2, 3, 5, 16, 33, 100, 255])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_chunk_of_any_size_has_the_bits_of_the_whole(size: int, threads: int) -> None:
    sequence = Sequence(HEADS[0], 530)
    cache = sequence.cache()
    table, kernel = sequence.stored(cache), PagedKernel(sequence.heads)
    found = [
        kernel(
            sequence.q[start : start + size],
            chunk_table((len(sequence.q[start : start + size]), start, table)),
            cache,
            threads,
        )
        for start in range(0, sequence.length, size)
    ]
    assert same_bits(torch.cat(found), whole(sequence))


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_neighbours_in_the_step_change_no_bit(threads: int) -> None:
    heads = HEADS[0]
    sequences = [Sequence(heads, n, seed=n) for n in (1, 40, 1030, 257, 16)]
    rows = [1, 7, 1, 257, 3]
    cache = AttentionLayer(heads).cache(100)
    chunks, queries, first = [], [], 0
    for sequence, count in zip(sequences, rows, strict=True):
        table = sequence.stored(cache, first)
        first += len(table)
        chunks.append((count, sequence.length - count, table))
        queries.append(sequence.q[-count:])
    found = PagedKernel(heads)(torch.cat(queries), chunk_table(*chunks), cache, threads)
    for part, sequence, count in zip(torch.split(found, rows), sequences, rows, strict=True):
        assert same_bits(part, whole(sequence)[-count:])


@pytest.mark.parametrize("stale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("length", [1, 2, 17, 20, 31, 257, 262])
def test_what_freed_slots_hold_changes_no_bit(stale: float, length: int) -> None:
    sequence = Sequence(HEADS[0], length)
    assert same_bits(whole(sequence, stale=stale), whole(sequence))


def test_a_token_that_is_not_a_number_spoils_no_row_before_it() -> None:
    sequence = Sequence(HEADS[0], 290)
    expected = whole(sequence)
    sequence.k[277], sequence.v[277] = math.nan, math.nan
    found = whole(sequence)
    assert same_bits(found[:277], expected[:277])
    assert found[277:].isnan().all()


@pytest.mark.parametrize("block_size", [32, 48, 128])
def test_the_size_of_a_block_changes_no_bit(block_size: int) -> None:
    sequence = Sequence(HEADS[0], 270)
    cache = sequence.cache(block_size)
    chunks = chunk_table((270, 0, sequence.stored(cache)))
    assert same_bits(PagedKernel(sequence.heads)(sequence.q, chunks, cache), whole(sequence))

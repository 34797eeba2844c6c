import torch

from mixfleet_engine.batch import Batch, make_batch
from mixfleet_engine.step import PlannedChunk
from support.plans import chunk, plan

CPU = torch.device("cpu")


def batch_of(*chunks: PlannedChunk, block_size: int = 4) -> Batch:
    return make_batch(plan(*chunks), block_size, CPU)


def test_the_worked_example() -> None:
    batch = batch_of(
        chunk([10, 11, 12], start=3, block_table=[7, 2]), chunk([13], start=1, block_table=[5])
    )
    assert batch.token_ids.tolist() == [10, 11, 12, 13]
    assert batch.positions.tolist() == [3, 4, 5, 1]
    assert batch.slots.tolist() == [31, 8, 9, 21]
    assert batch.sample_rows.tolist() == [2, 3]


def test_the_chunk_table_of_the_worked_example() -> None:
    batch = batch_of(
        chunk([0, 0, 0], start=3, block_table=[7, 2]), chunk([0], start=1, block_table=[5])
    )
    table = batch.chunks
    assert table.first_rows.tolist() == [0, 3]
    assert table.num_rows.tolist() == [3, 1]
    assert table.starts.tolist() == [3, 1]
    assert table.table_offsets.tolist() == [0, 2]
    assert table.tables.tolist() == [7, 2, 5]
    assert {part.dtype for part in (table.starts, table.tables)} == {torch.int32}


def test_slots_match_the_slow_count_token_by_token() -> None:
    tables = [[9, 4, 0, 7], [3, 8], [1, 2, 5]]
    chunks = [
        chunk(range(13), start=3, block_table=tables[0]),
        chunk([1], start=7, block_table=tables[1]),
        chunk(range(10), start=0, block_table=tables[2]),
    ]
    expected = [
        table[position // 4] * 4 + position % 4
        for table, c in zip(tables, chunks, strict=True)
        for position in range(c.start, c.start + len(c.token_ids))
    ]
    assert batch_of(*chunks).slots.tolist() == expected


def test_chunks_inside_a_prompt_are_not_sampled() -> None:
    batch = batch_of(
        chunk([1, 2], block_table=[0], samples=False),
        chunk([3], start=4, block_table=[1, 2]),
        chunk([4, 5, 6], block_table=[3], samples=False),
    )
    assert batch.sample_rows.tolist() == [2]


def test_a_step_without_any_sample_has_no_rows() -> None:
    assert batch_of(chunk([1, 2], block_table=[0], samples=False)).sample_rows.shape == (0,)


def test_a_first_chunk_is_plain_causal_and_a_later_one_sees_what_came_before() -> None:
    batch = batch_of(chunk([1, 2, 3], block_table=[0]), chunk([4, 5], start=2, block_table=[1]))
    first, later = batch.prefills
    assert (first.first_row, first.num_rows, first.mask) == (0, 3, None)
    assert (later.first_row, later.num_rows, later.start) == (3, 2, 2)
    assert later.mask is not None
    assert later.mask.tolist() == [[True, True, True, False], [True, True, True, True]]


def test_single_tokens_are_decodes_wherever_they_stand() -> None:
    batch = batch_of(
        chunk([1], start=5, block_table=[3, 4]),
        chunk([2, 3], block_table=[0]),
        chunk([4], start=6, block_table=[5, 6]),
    )
    (group,) = batch.decodes
    assert group.rows.tolist() == [0, 3]
    assert group.block_tables.tolist() == [[3, 4], [5, 6]]
    assert group.lengths == (6, 7)
    assert group.mask.sum(-1).tolist() == [6, 7]
    assert [p.first_row for p in batch.prefills] == [1]


def test_shorter_tables_of_a_group_are_filled_up_with_the_sequences_own_block() -> None:
    batch = batch_of(
        chunk([1], start=9, block_table=[7, 8, 9]), chunk([2], start=15, block_table=[1, 2, 3, 4])
    )
    (group,) = batch.decodes
    assert group.block_tables.tolist() == [[7, 8, 9, 7], [1, 2, 3, 4]]
    assert group.mask[0].tolist() == [True] * 10 + [False] * 6


def test_a_long_context_does_not_make_short_ones_long() -> None:
    short = [chunk([1], start=3, block_table=[i]) for i in range(3)]
    batch = batch_of(*short, chunk([2], start=399, block_table=range(100, 200)))
    assert sorted(group.block_tables.shape for group in batch.decodes) == [(1, 100), (3, 1)]
    for group in batch.decodes:
        widths = [-(-length // 4) for length in group.lengths]
        assert max(widths) < 2 * max(1, min(widths)) or len(widths) == 1


def test_groups_hold_every_decode_once() -> None:
    chunks = [chunk([1], start=n * n, block_table=range(n * n // 4 + 1)) for n in range(12)]
    batch = batch_of(*chunks)
    rows = [row for group in batch.decodes for row in group.rows.tolist()]
    assert sorted(rows) == list(range(12))

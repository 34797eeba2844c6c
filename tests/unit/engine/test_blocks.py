from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mixfleet_engine.blocks import BlockAllocator
from mixfleet_engine.errors import ConfigError, OutOfBlocksError


def test_a_new_allocator_has_all_blocks_free() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=16)
    assert (allocator.num_free, allocator.num_blocks, allocator.block_size) == (3, 3, 16)


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "named"), [(0, 16, "num_blocks=0"), (3, -1, "block_size=-1")]
)
def test_impossible_sizes_are_refused_with_the_value(
    num_blocks: int, block_size: int, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        BlockAllocator(num_blocks=num_blocks, block_size=block_size)


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0), (1, 1), (3, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_a_begun_block_counts_whole(num_tokens: int, expected: int) -> None:
    assert BlockAllocator(num_blocks=1, block_size=4).num_blocks_for(num_tokens) == expected


def test_allocate_takes_all_blocks_or_none() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=16)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocksError, match="asked for 3 KV blocks, 2 are free") as caught:
        allocator.allocate(3)
    assert (caught.value.asked, caught.value.free) == (3, 2)
    assert allocator.num_free == 2
    assert len(allocator.allocate(2)) == 2


def test_allocating_nothing_works_when_nothing_is_free() -> None:
    allocator = BlockAllocator(num_blocks=1, block_size=16)
    allocator.allocate(1)
    assert allocator.allocate(0) == []


def test_the_longest_free_block_is_handed_out_first() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=16)
    first, second = allocator.allocate(2)
    allocator.release([second])
    allocator.release([first])
    assert allocator.allocate(3) == [2, second, first]


@pytest.mark.parametrize("blocks", [[2], [0, 0], [0, 2], [-1], [3]])
def test_releasing_what_is_not_taken_changes_nothing(blocks: list[int]) -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=16)
    assert allocator.allocate(2) == [0, 1]
    with pytest.raises(ValueError, match="not all held"):
        allocator.release(blocks)
    assert allocator.num_free == 1


def test_a_block_cannot_be_released_twice() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=16)
    blocks = allocator.allocate(2)
    allocator.release(blocks)
    with pytest.raises(ValueError, match="not all held"):
        allocator.release(blocks)


def resting(allocator: BlockAllocator, *tokens: int) -> list[int]:
    """Let one sequence of blocks of one token come, become known and go."""
    table = allocator.allocate(len(tokens))
    for number in range(len(tokens)):
        allocator.prefixes.add(table, number, tokens)
    allocator.release(table)
    return table


def test_a_known_block_rests_when_it_is_released_and_counts_as_free() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=1)
    table = resting(allocator, 5, 6)
    assert allocator.num_free == 3
    assert allocator.prefixes.find((5, 6), 2) == table


def test_plain_blocks_are_taken_before_resting_ones() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=1)
    (block,) = resting(allocator, 5)
    assert block not in allocator.allocate(2)
    assert allocator.prefixes.find((5,), 1) == [block]
    assert allocator.allocate(1) == [block]
    assert allocator.prefixes.find((5,), 1) == []


def test_the_longest_resting_block_is_forgotten_first_and_the_end_before_the_beginning() -> None:
    allocator = BlockAllocator(num_blocks=4, block_size=1)
    old = resting(allocator, 5, 6)
    new = resting(allocator, 7, 8)
    assert allocator.allocate(4) == [old[1], old[0], new[1], new[0]]


def test_sharing_a_block_again_makes_it_young() -> None:
    allocator = BlockAllocator(num_blocks=2, block_size=1)
    (old,) = resting(allocator, 5)
    (new,) = resting(allocator, 6)
    allocator.share([old])
    assert (allocator.num_free, allocator.num_holders(old)) == (1, 1)
    allocator.release([old])
    assert allocator.allocate(2) == [new, old]


def test_a_shared_block_is_free_when_its_last_holder_is_gone() -> None:
    allocator = BlockAllocator(num_blocks=1, block_size=1)
    (block,) = allocator.allocate(1)
    allocator.share([block])
    assert allocator.num_holders(block) == 2
    allocator.release([block])
    assert (allocator.num_free, allocator.num_holders(block)) == (0, 1)
    allocator.release([block])
    assert (allocator.num_free, allocator.num_holders(block)) == (1, 0)


def test_what_neither_is_held_nor_rests_cannot_be_shared() -> None:
    allocator = BlockAllocator(num_blocks=3, block_size=1)
    held = allocator.allocate(1)
    with pytest.raises(ValueError, match="not all held or resting"):
        allocator.share([*held, 2])
    assert allocator.num_holders(held[0]) == 1


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a plain list of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(num_blocks=12, block_size=4)
        self.owned: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 14))
    def allocate(self, num_blocks: int) -> None:
        if num_blocks > self.allocator.num_free:
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate(num_blocks)
        else:
            blocks = self.allocator.allocate(num_blocks)
            assert len(set(blocks)) == num_blocks
            assert not any(set(blocks) & set(others) for others in self.owned)
            self.owned.append(blocks)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.allocator.release(self.owned.pop(index))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.allocator.share(self.owned[index])
        self.owned.append(list(self.owned[index]))

    @invariant()
    def every_block_is_free_or_held_as_often_as_somebody_owns_it(self) -> None:
        times = Counter(block for blocks in self.owned for block in blocks)
        assert set(times) <= set(range(12))
        assert all(self.allocator.num_holders(block) == times[block] for block in range(12))
        assert len(times) + self.allocator.num_free == 12


TestAllocatorMachine = AllocatorMachine.TestCase
TestAllocatorMachine.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, derandomize=True, database=None
)

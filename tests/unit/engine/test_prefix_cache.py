from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mixfleet_engine.blocks import BlockAllocator
from mixfleet_engine.errors import OutOfBlocksError
from mixfleet_engine.prefix_cache import PrefixCache

NUM_BLOCKS = 8


def filled(*sequences: tuple[int, ...]) -> PrefixCache:
    """A cache of blocks of 2 tokens; sequence 0 is in the blocks 0, 1, ..., 1 in 10, 11, ..."""
    cache = PrefixCache(2)
    for number, token_ids in enumerate(sequences):
        table = [10 * number + n for n in range(len(token_ids) // 2)]
        for place in range(len(table)):
            table[place] = cache.add(table, place, token_ids)
    return cache


def test_a_new_cache_knows_nothing() -> None:
    cache = PrefixCache(2)
    assert (cache.find((1, 2), 1), len(cache), 0 in cache) == ([], 0, False)


def test_the_longest_known_beginning_is_found() -> None:
    cache = filled((1, 2, 3, 4, 5, 6))
    assert cache.find((1, 2, 3, 4, 5, 6, 7), 3) == [0, 1, 2]
    assert cache.find((1, 2, 3, 4, 9, 9), 3) == [0, 1]
    assert cache.find((9, 2, 3, 4, 5, 6), 3) == []


def test_no_more_blocks_are_found_than_were_asked_for() -> None:
    assert filled((1, 2, 3, 4)).find((1, 2, 3, 4), 1) == [0]


def test_equal_blocks_after_different_beginnings_are_different() -> None:
    cache = filled((1, 2, 7, 7), (3, 4, 7, 7))
    assert cache.find((1, 2, 7, 7), 2) == [0, 1]
    assert cache.find((3, 4, 7, 7), 2) == [10, 11]
    assert cache.find((7, 7), 1) == []


def test_tokens_with_equal_hashes_are_not_taken_for_each_other() -> None:
    # In Python, -1 and -2 have the same hash, so the two blocks share a place in every dict.
    assert hash((-1, 5)) == hash((-2, 5))
    cache = filled((-1, 5))
    assert cache.find((-2, 5), 1) == []
    assert cache.find((-1, 5), 1) == [0]


def test_the_first_block_of_a_content_is_kept_and_handed_to_the_second() -> None:
    cache = filled((1, 2, 3, 4), (1, 2, 3, 4))
    assert cache.find((1, 2, 3, 4), 2) == [0, 1]
    assert (10 in cache, 11 in cache, len(cache)) == (False, False, 2)


def test_a_later_sequence_goes_on_after_the_blocks_of_the_first() -> None:
    cache = filled((1, 2), (1, 2, 5, 6))
    assert cache.find((1, 2, 5, 6), 2) == [0, 11]


def test_adding_a_block_twice_changes_nothing() -> None:
    cache = filled((1, 2))
    assert cache.add([0], 0, (1, 2)) == 0
    assert cache.find((1, 2), 1) == [0]


def test_after_a_forgotten_block_nothing_is_found_and_nothing_learnt() -> None:
    cache = filled((1, 2, 3, 4))
    cache.forget(0)
    assert cache.find((1, 2, 3, 4), 2) == []
    assert cache.add([0, 1, 2], 2, (1, 2, 3, 4, 5, 6)) == 2
    assert cache.add([0, 9], 1, (1, 2, 3, 4)) == 9
    assert 9 not in cache


def test_a_beginning_that_is_learnt_again_does_not_lead_to_what_came_after_the_forgotten_one() -> (
    None
):
    cache = filled((1, 2, 3, 4))
    cache.forget(0)
    cache.add([5], 0, (1, 2))
    assert cache.find((1, 2, 3, 4), 2) == [5]


def test_forgetting_what_is_not_known_is_no_error() -> None:
    cache = filled((1, 2))
    cache.forget(7)
    assert cache.find((1, 2), 1) == [0]


class CacheMachine(RuleBasedStateMachine):
    """Allocator and prefix cache against a list of what every block holds.

    A "sequence" here is a pair of tokens and table; blocks hold one token, so that chains are long
    and alphabets of two tokens make most of them meet.
    """

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(num_blocks=NUM_BLOCKS, block_size=1)
        self.sequences: list[tuple[tuple[int, ...], list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """All tokens up to a block's end, for every block that may be found."""

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple))
    def begin(self, tokens: tuple[int, ...]) -> None:
        hits = self.allocator.prefixes.find(tokens, len(tokens))
        assert hits == self.slow_find(tokens)
        self.allocator.share(hits)
        try:
            new = self.allocator.allocate(len(tokens) - len(hits))
        except OutOfBlocksError:
            self.allocator.release(hits)
            return
        for block in new:
            self.content.pop(block, None)
        table = hits + new
        for number in range(len(hits), len(tokens)):
            known = self.allocator.prefixes.add(table, number, tokens)
            # Nothing else became known in between, so this content was not known before.
            assert known == table[number]
            self.content[known] = tokens[: number + 1]
        self.sequences.append((tokens, table))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def compute_the_same_without_looking(self, data: st.DataObject) -> None:
        tokens, table = data.draw(st.sampled_from(self.sequences))
        if self.allocator.num_free < len(tokens):
            return
        own = self.allocator.allocate(len(tokens))
        for block in own:
            self.content.pop(block, None)
        for number, block in enumerate(own):
            known = self.allocator.prefixes.add(own, number, tokens)
            assert known == table[number]
            self.allocator.share([known])
            self.allocator.release([block])
            own[number] = known
        self.sequences.append((tokens, own))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.allocator.release(self.sequences.pop(index)[1])

    def slow_find(self, tokens: tuple[int, ...]) -> list[int]:
        found = []
        for stop in range(1, len(tokens) + 1):
            blocks = [block for block, held in self.content.items() if held == tokens[:stop]]
            assert len(blocks) <= 1, "one content in two blocks"
            if not blocks:
                break
            found += blocks
        return found

    @invariant()
    def every_content_can_be_found_from_its_beginning(self) -> None:
        assert len(self.allocator.prefixes) == len(self.content)
        for block, held in self.content.items():
            assert self.allocator.prefixes.find(held, len(held))[-1] == block

    @invariant()
    def no_block_of_a_live_sequence_holds_anything_else(self) -> None:
        for tokens, table in self.sequences:
            assert [self.content[block] for block in table] == [
                tokens[: number + 1] for number in range(len(tokens))
            ]

    @invariant()
    def every_block_is_free_or_held_as_often_as_it_stands_in_a_table(self) -> None:
        tables = [table for _, table in self.sequences]
        for block in range(NUM_BLOCKS):
            times = sum(table.count(block) for table in tables)
            assert self.allocator.num_holders(block) == times
        num_held = len({block for table in tables for block in table})
        assert self.allocator.num_free == NUM_BLOCKS - num_held

    def teardown(self) -> None:
        for _, table in self.sequences:
            self.allocator.release(table)
        assert sorted(self.allocator.allocate(NUM_BLOCKS)) == list(range(NUM_BLOCKS))
        assert len(self.allocator.prefixes) == 0


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None
)

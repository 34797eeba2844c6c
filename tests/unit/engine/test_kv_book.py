import pytest

from mixfleet_engine.errors import OutOfBlocksError
from mixfleet_engine.kv_book import KvBook
from mixfleet_engine.sequence import Sequence
from support.engine_requests import make_request


def make_book(*, num_blocks: int = 8, prefix_cache: bool = True) -> KvBook:
    return KvBook(num_blocks=num_blocks, block_size=2, prefix_cache=prefix_cache)


def make_sequence(*prompt: int) -> Sequence:
    return Sequence(make_request(prompt=prompt, max_tokens=50))


def admitted(book: KvBook, *prompt: int) -> Sequence:
    sequence = make_sequence(*prompt)
    assert book.admit(sequence, leave=0)
    return sequence


def compute(book: KvBook, sequence: Sequence, token_id: int | None = 9) -> None:
    """Run all pending tokens of a sequence and add the one sampled; None: nothing is sampled."""
    num_tokens = sequence.num_pending
    book.chunk(sequence, num_tokens)
    book.book(sequence, num_tokens, sampled=token_id is not None)
    if token_id is not None:
        sequence.append(token_id)


def computed(book: KvBook, *prompt: int) -> Sequence:
    sequence = admitted(book, *prompt)
    compute(book, sequence)
    return sequence


def test_an_admitted_sequence_has_blocks_for_all_its_tokens() -> None:
    book = make_book()
    sequence = admitted(book, 1, 2, 3)
    assert (len(sequence.block_table), sequence.num_cached, book.num_free) == (2, 0, 6)
    assert book.num_missing(sequence) == 0


def test_admission_leaves_the_blocks_that_others_need() -> None:
    book = make_book(num_blocks=3)
    sequence = make_sequence(1, 2, 3)
    assert not book.admit(sequence, leave=2)
    assert (sequence.block_table, book.num_free, book.num_queried_tokens) == ([], 3, 0)
    assert book.admit(sequence, leave=1)


def test_a_sequence_grows_by_the_blocks_it_lacks() -> None:
    book = make_book(num_blocks=3)
    sequence = computed(book, 1, 2, 3, 4)
    assert book.num_missing(sequence) == 1
    book.grow(sequence)
    assert (len(sequence.block_table), book.num_missing(sequence)) == (3, 0)
    for token_id in (5, 6):
        sequence.append(token_id)
    with pytest.raises(OutOfBlocksError):
        book.grow(sequence)


def test_full_blocks_are_shared_from_the_step_on_that_computed_them() -> None:
    book = make_book()
    first = admitted(book, 1, 2, 3, 4, 5)
    assert admitted(book, 1, 2, 3, 4, 6).num_cached == 0
    compute(book, first)
    third = admitted(book, 1, 2, 3, 4, 7)
    assert third.num_cached == 4
    assert third.block_table[:2] == first.block_table[:2]
    assert third.block_table[2] != first.block_table[2]


@pytest.mark.parametrize(("prompt", "num_cached"), [((1, 2, 3, 4), 2), ((1, 2, 3, 4, 5), 4)])
def test_the_last_token_is_always_computed(prompt: tuple[int, ...], num_cached: int) -> None:
    book = make_book()
    computed(book, 1, 2, 3, 4, 5, 6)
    assert admitted(book, *prompt).num_cached == num_cached


def test_a_block_that_is_not_full_is_never_shared() -> None:
    book = make_book()
    computed(book, 1, 2, 3)
    assert admitted(book, 1, 2, 3, 4, 5).num_cached == 2


def test_the_answer_is_found_with_its_prompt_when_the_conversation_goes_on() -> None:
    book = make_book()
    turn = computed(book, 1, 2, 3)
    for token_id in (8, 7, 6):
        book.grow(turn)
        compute(book, turn, token_id)
    assert turn.token_ids == [1, 2, 3, 9, 8, 7, 6]
    book.drop(turn)
    assert admitted(book, 1, 2, 3, 9, 8, 7, 6, 5).num_cached == 6


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    book = make_book()
    sequence = computed(book, 1, 2, 3, 4, 5)
    table = list(sequence.block_table)
    book.drop(sequence)
    assert book.num_free == 8
    assert book.admit(sequence, leave=0)
    assert (sequence.num_cached, sequence.block_table[:2]) == (4, table[:2])


def test_two_that_computed_the_same_share_it_afterwards() -> None:
    book = make_book()
    first, second = admitted(book, 1, 2, 3, 4, 5), admitted(book, 1, 2, 3, 4, 6)
    for sequence in (first, second):
        compute(book, sequence)
    assert first.block_table[:2] == second.block_table[:2]
    assert book.num_free == 8 - 4
    assert (book.num_alone(first), book.num_alone(second)) == (1, 1)
    book.drop(first)
    assert book.num_alone(second) == 3


def test_counters_tell_how_many_tokens_were_found() -> None:
    book = make_book()
    computed(book, 1, 2, 3, 4, 5)
    admitted(book, 1, 2, 3, 7)
    assert (book.num_queried_tokens, book.num_hit_tokens) == (9, 2)


def test_resting_blocks_that_are_hit_are_not_counted_as_free_a_second_time() -> None:
    book = make_book(num_blocks=3)
    book.drop(computed(book, 1, 2, 3, 4, 5))
    assert book.num_free == 3
    assert not book.admit(make_sequence(1, 2, 3, 4, 6), leave=1)
    assert admitted(book, 1, 2, 3, 4, 6).num_cached == 4


def test_without_the_prefix_cache_nothing_is_shared() -> None:
    book = make_book(prefix_cache=False)
    first = computed(book, 1, 2, 3, 4, 5)
    second = computed(book, 1, 2, 3, 4, 5)
    assert not set(first.block_table) & set(second.block_table)
    assert (second.num_cached, book.num_hit_tokens) == (5, 0)


def take_all(book: KvBook) -> Sequence:
    """Let one sequence take every block that is free."""
    return admitted(book, *range(100, 100 + 2 * book.num_free))


def test_blocks_of_finite_samples_serve_the_next_owner_as_they_are() -> None:
    book = make_book()
    book.drop(computed(book, 1, 2, 3))
    take_all(book)
    assert book.unclean == ()


def test_blocks_without_finite_logits_are_never_found_and_cleared_for_the_next_owner() -> None:
    book = make_book()
    broken = admitted(book, 1, 2, 3)
    compute(book, broken, None)
    table = broken.block_table
    book.condemn(broken)
    book.drop(broken)
    assert book.unclean == ()  # nobody needs them yet
    other = take_all(book)
    assert (other.num_cached, book.unclean) == (0, tuple(sorted(table)))
    assert book.take_unclean() == tuple(sorted(table))
    assert book.unclean == ()


def test_others_go_on_with_blocks_that_one_of_them_found_wanting() -> None:
    book = make_book()
    sound, broken = computed(book, 1, 2, 3, 4, 5), admitted(book, 1, 2, 3, 4, 6)
    table = list(sound.block_table)
    compute(book, broken, None)
    book.condemn(broken)
    book.drop(broken)
    compute(book, sound)
    assert sound.block_table == table
    assert admitted(book, 1, 2, 3, 4, 7).num_cached == 0


def test_what_was_computed_but_never_sampled_from_is_cleared_when_nobody_remembers_it() -> None:
    book = make_book(prefix_cache=False)
    sequence = admitted(book, 1, 2, 3, 4, 5)
    book.chunk(sequence, 4)
    book.book(sequence, 4, sampled=False)
    written = sequence.block_table[:2]
    book.drop(sequence)
    take_all(book)
    assert book.unclean == tuple(sorted(written))


def test_a_step_that_never_ended_leaves_its_blocks_in_doubt() -> None:
    book = make_book()
    sequence = computed(book, 1, 2, 3)
    book.chunk(sequence, 1)  # and the run fails
    last = sequence.block_table[-1]
    book.drop(sequence)
    take_all(book)
    assert book.unclean == (last,)


def test_a_block_stays_in_doubt_while_a_later_step_writes_to_it() -> None:
    book = make_book()
    sequence = admitted(book, 1, 2, 3)
    book.chunk(sequence, 3)
    book.chunk(sequence, 1)
    last = sequence.block_table[-1]
    book.book(sequence, 3, sampled=True)
    sequence.append(9)
    book.drop(sequence)
    take_all(book)
    assert book.unclean == (last,)


def test_blocks_that_a_planned_step_did_not_clear_are_left_to_the_next() -> None:
    book = make_book(num_blocks=1)
    broken = admitted(book, 1)
    compute(book, broken, None)
    book.drop(broken)
    admitted(book, 2)
    assert (book.take_unclean(), book.unclean) == ((0,), ())
    book.give_back_unclean((0,))
    assert book.unclean == (0,)


def test_a_block_too_many_is_none_that_lacks() -> None:
    book = make_book()
    sequence = admitted(book, 1, 2)
    book.chunk(sequence, 2)
    book.grow(sequence)
    assert len(sequence.block_table) == 2, "the unread token needs one"
    sequence.unplan()
    assert book.num_missing(sequence) == 0


def test_who_hits_blocks_in_doubt_and_samples_settles_it() -> None:
    book = make_book()
    chunked = admitted(book, 1, 2, 3, 4, 5)
    book.chunk(chunked, 4)
    book.book(chunked, 4, sampled=False)
    book.drop(chunked)
    hit = computed(book, 1, 2, 3, 4, 6)
    assert hit.token_ids[-1] == 9
    book.drop(hit)
    take_all(book)
    assert book.unclean == ()

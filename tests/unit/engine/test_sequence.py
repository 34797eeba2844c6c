import pytest

from mixfleet_engine.request import SamplingParams
from mixfleet_engine.sequence import Sequence
from mixfleet_engine.step import UNREAD
from support.engine_requests import make_request


def test_a_new_sequence_has_everything_pending() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7)))
    assert (sequence.num_tokens, sequence.num_output) == (3, 0)
    assert (sequence.num_cached, sequence.num_pending) == (0, 3)
    assert sequence.block_table == []


def test_a_continued_answer_is_pending_together_with_its_prompt() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7), output=(8, 9), max_tokens=3))
    assert sequence.token_ids == [5, 6, 7, 8, 9]
    assert (sequence.num_output, sequence.num_pending) == (2, 5)


def test_a_chunk_inside_the_prompt_does_not_sample() -> None:
    sequence = Sequence(make_request("id", prompt=(5, 6, 7), sampling=SamplingParams(seed=3)))
    sequence.block_table = [4, 2]
    chunk = sequence.chunk(2, 1)
    assert (chunk.request_id, chunk.sampling) == ("id", SamplingParams(seed=3))
    assert (chunk.token_ids, chunk.start, chunk.block_table) == ((5, 6), 0, (4,))
    assert not chunk.samples


def test_the_chunk_that_ends_the_prompt_samples_position_0() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7)))
    sequence.block_table = [4, 2]
    sequence.num_cached = 2
    chunk = sequence.chunk(1, 2)
    assert (chunk.token_ids, chunk.start, chunk.block_table) == ((7,), 2, (4, 2))
    assert (chunk.samples, chunk.position) == (True, 0)


def test_what_is_planned_counts_as_done_and_its_token_as_there() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7), max_tokens=2))
    sequence.chunk(2, 1)
    assert (sequence.num_cached, sequence.start, sequence.num_pending) == (0, 2, 1)
    sequence.chunk(1, 1, row=3)
    assert (sequence.num_tokens, sequence.num_output, sequence.num_pending) == (4, 1, 1)
    unread = sequence.chunk(1, 1, row=0)
    assert (unread.token_ids, unread.unread_row) == ((UNREAD,), 3)
    assert (unread.start, unread.position, unread.samples) == (3, 1, True)
    assert sequence.is_full


def test_what_is_booked_is_cached_and_its_token_is_not_unread_any_more() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7), max_tokens=3))
    sequence.chunk(3, 1)
    sequence.chunk(1, 1)
    sequence.book(3, sampled=True)
    assert sequence.append(8) is None
    assert (sequence.num_cached, sequence.start) == (3, 4)
    assert (sequence.num_tokens, sequence.num_pending) == (5, 1)


def test_what_was_planned_can_be_forgotten() -> None:
    sequence = Sequence(make_request(prompt=(5, 6, 7)))
    first = sequence.chunk(3, 1)
    sequence.chunk(1, 1)
    sequence.unplan()
    assert (sequence.num_tokens, sequence.start, sequence.num_pending) == (3, 0, 3)
    assert sequence.chunk(3, 1) == first


def test_a_full_answer_ends_by_its_tokens_not_by_the_one_after() -> None:
    sequence = Sequence(make_request(prompt=(5,), max_tokens=2))
    sequence.chunk(1, 1)
    sequence.chunk(1, 1)
    sequence.book(1, sampled=True)
    assert sequence.append(8) is None
    sequence.book(1, sampled=True)
    assert sequence.append(8) == "length"


@pytest.mark.parametrize(
    ("sampling", "max_tokens", "awaits"),
    [
        (SamplingParams(), 9, False),
        (SamplingParams(presence_penalty=0.1), 9, True),
        (SamplingParams(presence_penalty=0.1), 1, False),
    ],
)
def test_an_unread_token_is_awaited_where_the_next_choice_hangs_on_it(
    sampling: SamplingParams, max_tokens: int, *, awaits: bool
) -> None:
    sequence = Sequence(make_request(prompt=(5, 6), sampling=sampling, max_tokens=max_tokens))
    assert not sequence.awaits_token
    sequence.chunk(1, 1)
    assert not sequence.awaits_token, "nothing is sampled yet"
    sequence.chunk(1, 1)
    assert sequence.awaits_token == awaits


def test_the_position_counts_the_tokens_of_an_earlier_run() -> None:
    sequence = Sequence(make_request(prompt=(5,), output=(8, 9), max_tokens=4))
    chunk = sequence.chunk(3, 0)
    assert (chunk.samples, chunk.position) == (True, 2)


@pytest.mark.parametrize(
    ("token_ids", "reasons"),
    [
        ((1, 1, 1), [None, None, "length"]),
        ((1, 9), [None, "stop"]),
        ((9,), ["stop"]),
        ((1, 1, 9), [None, None, "stop"]),  # a stop token on the last allowed place
    ],
)
def test_an_answer_ends_with_a_stop_token_or_at_max_tokens(
    token_ids: tuple[int, ...], reasons: list[str | None]
) -> None:
    sequence = Sequence(make_request(max_tokens=3, stops=(9,)))
    assert [sequence.append(token_id) for token_id in token_ids] == reasons


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    sequence = Sequence(make_request(prompt=(9, 9), max_tokens=3, stops=(9,)))
    assert sequence.append(1) is None


def test_dropping_the_cache_keeps_the_tokens() -> None:
    sequence = Sequence(make_request(prompt=(5, 6), max_tokens=3))
    sequence.block_table = [4, 2]
    sequence.num_cached = 2
    sequence.append(8)
    assert sequence.drop_cache() == [4, 2]
    assert (sequence.token_ids, sequence.block_table) == ([5, 6, 8], [])
    assert (sequence.num_cached, sequence.num_pending, sequence.num_output) == (0, 3, 1)


def test_dropping_the_cache_forgets_what_was_known_of_its_blocks() -> None:
    sequence = Sequence(make_request())
    sequence.num_known, sequence.num_trusted, sequence.refused_at = 3, 2, 7
    sequence.drop_cache()
    fresh = Sequence(make_request())
    for name in ("num_known", "num_trusted", "refused_at"):
        assert getattr(sequence, name) == getattr(fresh, name)


def test_the_order_is_priority_first_and_then_arrival() -> None:
    urgent, first, second = (
        Sequence(make_request(priority=priority), arrival)
        for priority, arrival in ((-1, 9), (0, 1), (0, 2))
    )
    assert urgent.order < first.order < second.order


@pytest.mark.parametrize(
    ("deadline", "overdue"), [(None, False), (5.1, False), (5.0, True), (-1.0, True)]
)
def test_a_request_is_overdue_from_its_deadline_on(
    deadline: float | None, *, overdue: bool
) -> None:
    assert Sequence(make_request(deadline=deadline)).is_overdue(5.0) == overdue


def test_a_chunk_carries_the_history_itself_not_a_copy() -> None:
    sequence = Sequence(make_request(prompt=(5, 6), max_tokens=3))
    chunk = sequence.chunk(2, 0)
    sequence.append(7)
    assert chunk.history is sequence.history
    assert (chunk.history.token_ids, chunk.history.num_output) == ([5, 6, 7], 1)

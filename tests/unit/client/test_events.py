import logging
from dataclasses import replace

import pytest

from mixfleet.events import EventReader, Patience
from mixfleet_broker.errors import (
    BrokerUnavailableError,
    StreamTimeoutError,
    UnknownJobError,
)
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
    RunStarted,
    TokenChunk,
)
from mixfleet_broker.records import JobInfo
from mixfleet_broker.terms import JobTerms
from support.fake_transport import FakeClock, FakeTransport, answer, chunk, fleet

PATIENCE = Patience(silence_s=30.0)


def reader_of(
    transport: FakeTransport,
    clock: FakeClock,
    *,
    patience: Patience = PATIENCE,
    after: str | None = None,
) -> EventReader:
    if "a" not in transport.jobs:
        transport.submit(ChatJob(job_id="a", model="tiny", prompt="x"), JobTerms())
    return EventReader(
        transport,
        "a",
        model="tiny",
        after=after,
        patience=patience,
        clock=clock,
        sleep=clock.sleep,
    )


def all_events(reader: EventReader) -> list[JobEvent]:
    events: list[JobEvent] = []
    while not events or not isinstance(events[-1], JobEnd):
        event = reader.next_event()
        assert event is not None
        events.append(event)
    return events


def test_events_come_in_order_from_the_start() -> None:
    transport, clock = fleet(answer("a", "b"))
    kinds = [type(event) for event in all_events(reader_of(transport, clock))]
    assert kinds == [RunStarted, TokenChunk, TokenChunk, JobEnd]


def test_a_reader_goes_on_after_any_event_id() -> None:
    transport, clock = fleet(answer("a", "b", "c"))
    whole = all_events(reader_of(transport, clock))
    for taken in range(len(whole)):
        first = reader_of(transport, clock)
        for _ in range(taken):
            first.next_event()
        second = reader_of(transport, clock, after=first.last_event_id)
        assert all_events(second) == whole[taken:]


def test_a_wait_with_a_timeout_gives_none_and_can_go_on() -> None:
    transport, clock = fleet(answer("a", delay_s=3.0))
    reader = reader_of(transport, clock)
    started = clock.now
    assert reader.next_event(timeout_s=1.0) is None
    assert clock.now == started + 1.0
    assert isinstance(reader.next_event(), RunStarted)


def test_the_reader_blocks_instead_of_polling() -> None:
    transport, clock = fleet(answer("a", delay_s=20.0))
    reader_of(transport, clock).next_event()
    assert transport.read_calls <= 5


def test_no_first_token_in_time_is_a_timeout_with_the_numbers() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock, patience=replace(PATIENCE, first_token_s=7.0))
    started = clock.now
    with pytest.raises(StreamTimeoutError) as raised:
        reader.next_event()
    assert clock.now == pytest.approx(started + 7.0)
    assert (raised.value.job_id, raised.value.limit_s) == ("a", 7.0)
    assert "first token" in str(raised.value)


def test_the_first_token_timeout_is_over_once_a_token_came() -> None:
    transport, clock = fleet(answer("a", "b", "c", delay_s=4.0))
    patience = replace(PATIENCE, first_token_s=9.0)
    assert len(all_events(reader_of(transport, clock, patience=patience))) == 5


def test_the_total_timeout_ends_even_a_stream_that_flows() -> None:
    transport, clock = fleet(answer(*"abcdefghijkl", delay_s=1.0))
    reader = reader_of(transport, clock, patience=replace(PATIENCE, total_s=4.0))
    with pytest.raises(StreamTimeoutError, match="end of the answer"):
        all_events(reader)


def test_a_long_silence_without_a_worker_is_warned_of_once_and_waited_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport, clock = fleet(answer("a", delay_s=100.0))
    transport.workers = 0
    with caplog.at_level(logging.WARNING):
        reader_of(transport, clock).next_event()
    assert [record.getMessage() for record in caplog.records] == [
        "no worker job_id=a model=tiny state=queued"
    ]


def test_a_long_silence_with_a_worker_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    transport, clock = fleet(answer("a", delay_s=100.0))
    reader_of(transport, clock).next_event()
    assert not caplog.records


def test_a_job_that_vanished_is_unknown_after_a_silence() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock)
    transport.jobs.clear()
    started = clock.now
    with pytest.raises(UnknownJobError):
        reader.next_event()
    assert clock.now <= started + PATIENCE.silence_s + 5.0


def test_an_ended_job_whose_answer_is_gone_is_unknown() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock)
    transport.jobs["a"].state = "finished"
    with pytest.raises(UnknownJobError):
        reader.next_event()


def test_an_end_that_came_while_looking_around_is_read() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock)
    status = transport.status

    def status_of_a_job_that_just_ended(job_id: str, model: str) -> JobInfo:
        transport.jobs[job_id].state = "failed"
        transport.schedule(job_id, [(0.0, JobEnd(state="failed", code="worker_lost"))])
        return status(job_id, model)

    transport.status = status_of_a_job_that_just_ended  # type: ignore[method-assign]
    assert isinstance(reader.next_event(), JobEnd)


def test_a_short_outage_is_waited_out() -> None:
    transport, clock = fleet(answer("a"))
    reader = reader_of(transport, clock)
    transport.outage_until = clock.now + 10.0
    assert len(all_events(reader)) == 3


def test_a_long_outage_is_the_callers_to_see() -> None:
    transport, clock = fleet(answer("a"))
    reader = reader_of(transport, clock)
    transport.outage_until = clock.now + 1000.0
    started = clock.now
    with pytest.raises(BrokerUnavailableError):
        reader.next_event()
    assert PATIENCE.outage_s <= clock.now - started <= PATIENCE.outage_s + 5.0


def test_a_redis_that_came_back_empty_is_noticed_at_once() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock)
    transport.outage_until = clock.now + 3.0
    transport.jobs.clear()
    started = clock.now
    with pytest.raises(UnknownJobError):
        reader.next_event()
    assert clock.now - started < PATIENCE.silence_s


def test_two_outages_are_counted_apart() -> None:
    transport, clock = fleet()
    reader = reader_of(transport, clock)
    for number in (1, 2):
        transport.outage_until = clock.now + 20.0
        transport.schedule("a", [(25.0, chunk(number, "x"))])
        assert isinstance(reader.next_event(), TokenChunk)


def test_a_reader_ends_a_job_whose_deadline_is_over_where_nobody_else_does() -> None:
    clock = FakeClock()
    transport = FakeTransport(clock)
    patience = Patience(silence_s=1000.0, deadlines_s=(5.0, 20.0))
    reader = reader_of(transport, clock, patience=patience)
    assert reader.next_event(4.0) is None
    assert transport.expired == []
    assert reader.next_event(5.0) is None
    assert transport.expired == ["a"]
    assert reader.next_event(5.0) is None
    assert transport.expired == ["a"]
    assert reader.next_event(10.0) is None
    assert transport.expired == ["a", "a"]


def test_who_comes_back_behind_the_end_hears_it_again_at_once() -> None:
    transport, clock = fleet(answer("a"))
    first = reader_of(transport, clock)
    events = all_events(first)
    asked_at = clock.now
    second = reader_of(transport, clock, after=first.last_event_id)
    assert second.next_event() == events[-1]
    assert clock.now == asked_at


def test_who_comes_back_to_a_job_that_goes_on_waits_for_what_follows() -> None:
    transport, clock = fleet(answer("a", "b", delay_s=1.0))
    first = reader_of(transport, clock)
    first.next_event()
    second = reader_of(transport, clock, after=first.last_event_id)
    assert all_events(second)[-1] == all_events(first)[-1]

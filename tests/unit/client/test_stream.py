import logging
from dataclasses import replace

import pytest

from mixfleet.errors import (
    EngineFailedError,
    JobCancelledError,
    JobFailedError,
    MessageError,
    PromptTooLongError,
)
from mixfleet.events import Patience
from mixfleet.stream import ChatResult, ChatStream
from mixfleet_broker.messages import (
    ChatJob,
    JobEnd,
    JobEvent,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from mixfleet_broker.terms import JobTerms
from support.fake_transport import FakeClock, FakeTransport, answer, chunk, fleet


def stream_of(
    transport: FakeTransport,
    clock: FakeClock,
    *,
    after: str | None = None,
    is_owner: bool = True,
) -> ChatStream:
    if "a" not in transport.jobs:
        transport.submit(ChatJob(job_id="a", model="tiny", prompt="x"), JobTerms())
    return ChatStream(
        transport,
        "a",
        model="tiny",
        patience=Patience(),
        after=after,
        is_owner=is_owner,
        clock=clock,
    )


def failing(end: JobEnd, *texts: str) -> list[tuple[float, JobEvent]]:
    return [*answer(*texts)[:-1], (0.0, end)]


def test_iterating_gives_the_pieces_of_text_as_they_come() -> None:
    transport, clock = fleet(answer("Hel", "", "lo", delay_s=1.0))
    started = clock.now
    arrivals = [(text, clock.now - started) for text in stream_of(transport, clock)]
    assert arrivals == [("Hel", 2.0), ("lo", 4.0)]


def test_the_result_holds_the_whole_answer() -> None:
    transport, clock = fleet(answer("Hel", "lo", delay_s=0.5, finish_reason="length"))
    assert stream_of(transport, clock).result() == ChatResult(
        job_id="a",
        model="tiny",
        text="Hello",
        finish_reason="length",
        usage=Usage(prompt_tokens=5, completion_tokens=2),
        worker_ids=("gpu-0",),
        ttft_s=1.0,
        total_s=1.5,
    )


def told(number: int, text: str, num_prompt_tokens: int | None = None) -> TokenChunk:
    """A chunk with its log-probability."""
    logprob = TokenLogprob(token=text.encode(), logprob=-number / 2)
    return replace(chunk(number, text), logprobs=(logprob,), num_prompt_tokens=num_prompt_tokens)


def test_the_logprobs_of_an_answer_are_one_list_also_over_a_change_of_workers() -> None:
    end = JobEnd(
        state="finished",
        finish_reason="stop",
        usage=Usage(prompt_tokens=5, completion_tokens=3),
        stop_string="END",
    )
    transport, clock = fleet(
        [
            (0.1, RunStarted(run=7, worker_id="gpu-0", num_tokens=0)),
            (0.1, told(1, "a", 5)),
            (0.1, told(2, "b")),
            (20.0, RunStarted(run=8, worker_id="gpu-1", num_tokens=2)),
            (0.1, told(3, "c", 5)),
            (0.0, end),
        ]
    )
    stream = stream_of(transport, clock)
    assert (stream.num_prompt_tokens, stream.logprobs) == (None, ())
    assert next(iter(stream)) == "a"
    assert stream.num_prompt_tokens == 5
    assert stream.logprobs == (TokenLogprob(token=b"a", logprob=-0.5),)
    result = stream.result()
    assert [one.token for one in result.logprobs] == [b"a", b"b", b"c"]
    assert stream.logprobs == result.logprobs
    assert (stream.num_prompt_tokens, result.stop_string) == (5, "END")


def test_a_result_after_a_part_was_iterated_is_whole_and_may_be_asked_twice() -> None:
    transport, clock = fleet(answer("a", "b", "c"))
    stream = stream_of(transport, clock)
    assert next(iter(stream)) == "a"
    assert stream.text == "a"
    assert stream.result() == stream.result()
    assert stream.text == "abc"
    assert list(stream) == []


def test_events_tell_all_that_happens() -> None:
    transport, clock = fleet(answer("a", "b"))
    stream = stream_of(transport, clock)
    kinds = [type(event) for event in stream.events()]
    assert kinds == [RunStarted, TokenChunk, TokenChunk, JobEnd]
    assert stream.next_event() is None


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (JobEnd(state="failed", code="engine_failed", message="boom"), EngineFailedError),
        (JobEnd(state="failed", code="prompt_too_long", message="9 > 8"), PromptTooLongError),
        (JobEnd(state="failed", code="from the future", message="?"), JobFailedError),
        (JobEnd(state="canceled"), JobCancelledError),
    ],
)
def test_a_job_that_ends_badly_raises_its_error_and_keeps_the_text(
    end: JobEnd, kind: type[Exception]
) -> None:
    transport, clock = fleet(failing(end, "so ", "far"))
    stream = stream_of(transport, clock)
    with pytest.raises(kind) as raised:
        stream.result()
    assert raised.value.job_id == "a"  # type: ignore[attr-defined]
    assert stream.text == "so far"
    with pytest.raises(kind):
        list(stream)


def test_events_show_a_bad_end_without_raising() -> None:
    end = JobEnd(state="failed", code="engine_failed", message="boom")
    transport, clock = fleet(failing(end))
    assert list(stream_of(transport, clock).events())[-1] == end


def test_an_answer_continued_by_another_worker_is_one_text() -> None:
    transport, clock = fleet(
        [
            (0.1, RunStarted(run=7, worker_id="gpu-0", num_tokens=0)),
            (0.1, chunk(1, "one ")),
            (0.1, chunk(2, "two ")),
            (20.0, RunStarted(run=8, worker_id="gpu-1", num_tokens=2)),
            *answer("", "", "three")[3:],
        ]
    )
    result = stream_of(transport, clock).result()
    assert result.text == "one two three"
    assert result.worker_ids == ("gpu-0", "gpu-1")


@pytest.mark.parametrize(
    "bad",
    [chunk(3, "gap"), chunk(1, "again"), RunStarted(run=8, worker_id="b", num_tokens=0)],
    ids=["gap", "repeat", "restart"],
)
def test_a_stream_with_a_hole_or_a_repeat_is_refused(bad: JobEvent) -> None:
    transport, clock = fleet(
        [(0, RunStarted(run=7, worker_id="a", num_tokens=0)), (0, chunk(1, "x")), (0, bad)]
    )
    with pytest.raises(MessageError, match="but 1 were read"):
        stream_of(transport, clock).result()


def test_a_finished_job_without_its_counts_is_refused() -> None:
    transport, clock = fleet([(0, JobEnd(state="finished"))])
    with pytest.raises(MessageError, match="without a reason or usage"):
        stream_of(transport, clock).result()


def test_leaving_the_block_before_the_end_cancels() -> None:
    transport, clock = fleet(answer("a", "b", "c"))
    with stream_of(transport, clock) as stream:
        for _ in stream:
            break
    assert transport.cancelled == ["a"]


def test_an_error_in_the_block_cancels_and_passes() -> None:
    transport, clock = fleet(answer("a", "b"))
    with pytest.raises(KeyboardInterrupt), stream_of(transport, clock):
        raise KeyboardInterrupt
    assert transport.cancelled == ["a"]


@pytest.mark.parametrize("read_all", [True, False])
def test_the_block_leaves_an_ended_or_detached_job_alone(read_all: bool) -> None:
    transport, clock = fleet(answer("a"))
    with stream_of(transport, clock) as stream:
        if read_all:
            list(stream)
        else:
            assert stream.detach() == "a"
    assert transport.cancelled == []


def test_leaving_an_attached_stream_does_not_cancel() -> None:
    transport, clock = fleet(answer("a"))
    with stream_of(transport, clock, is_owner=False):
        pass
    assert transport.cancelled == []


def test_leaving_while_redis_is_away_is_logged_and_does_not_raise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transport, clock = fleet(answer("a"))
    with caplog.at_level(logging.WARNING), stream_of(transport, clock):
        transport.outage_until = clock.now + 10.0
    assert "cancel failed job_id=a" in caplog.text


def test_cancel_ends_the_stream_with_its_error() -> None:
    transport, clock = fleet(answer("a", "b", "c"))
    stream = stream_of(transport, clock)
    pieces = iter(stream)
    next(pieces)
    stream.cancel()
    with pytest.raises(JobCancelledError):
        list(pieces)
    assert stream.end == JobEnd(state="canceled")


def test_position_is_the_queues() -> None:
    transport, clock = fleet(answer("a"))
    stream = stream_of(transport, clock)
    assert stream.position() == 0
    transport.jobs["a"].state = "started"
    assert stream.position() is None


def test_a_second_stream_goes_on_where_the_first_stopped() -> None:
    transport, clock = fleet(answer("a", "b", "c", "d"))
    first = stream_of(transport, clock)
    pieces = iter(first)
    assert [next(pieces), next(pieces)] == ["a", "b"]
    second = stream_of(transport, clock, after=first.last_event_id, is_owner=False)
    assert second.result().text == "cd"
    assert second.result().ttft_s is None
    assert stream_of(transport, clock, is_owner=False).result().text == "abcd"

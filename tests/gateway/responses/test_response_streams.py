"""Streams of responses: complete, under the same numbers, whoever of the fleet goes away."""

from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from redis import Redis

from mixfleet_broker.channel import read_events
from mixfleet_broker.keys import READER
from mixfleet_broker.messages import JobEnd, Usage
from support.echo_worker import EchoWorker
from support.gateway import GatewayProcess
from support.hand_worker import HandWorker, job_of
from support.openai_client import ended, has_final, job_id_of, openai_client
from support.worker_process import until

pytestmark = pytest.mark.slow  # a gateway process starts in a second or two


@pytest.mark.usefixtures("echo")
def test_a_stream_tells_all_from_created_to_completed(client: OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="Hey", stream=True))
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "queued", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 3,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(12))
    last: Any = events[-1]
    assert last.response == client.responses.retrieve(last.response.id)


@pytest.mark.usefixtures("echo")
def test_the_clients_own_helper_reads_a_stream(client: OpenAI) -> None:
    with client.responses.stream(model="tiny", input="Hey") as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
        assert text == stream.get_final_response().output_text == "Hey"


STEPS = 5
NUM_EVENTS = 5 + STEPS + 4
TEXT = "wörld"


def advance(hand: HandWorker, number: int) -> Any:
    """Let the next job come so far that it has event ``number``, and not the one after."""
    if number < 2:
        return None
    claimed = hand.take()
    # The message begins with the first piece of text.
    num_chunks = 0 if number == 2 else min(max(1, number - 4), STEPS)
    hand.say(claimed, *TEXT[:num_chunks])
    if number >= 5 + STEPS:
        hand.finish(claimed)
    return claimed


def complete(hand: HandWorker, claimed: Any, number: int) -> None:
    if number >= 5 + STEPS:
        return
    claimed = claimed or hand.take()
    told = 0 if number <= 2 else min(max(1, number - 4), STEPS)
    hand.say(claimed, *TEXT[told:])
    hand.finish(claimed)


def test_a_stream_goes_on_at_another_gateway_after_any_event_when_its_own_was_killed(
    gateway: GatewayProcess, client: OpenAI, hand: HandWorker, redis_url: str, tmp_path: Path
) -> None:
    cut: dict[int, tuple[Any, list[Any], Any]] = {}
    for number in reversed(range(NUM_EVENTS)):
        stream: Any = client.responses.create(
            model="tiny", input="Hi", background=True, stream=True
        )
        claimed = advance(hand, number)
        events = [next(stream) for _ in range(number + 1)]
        cut[number] = claimed, events, stream
    with Redis.from_url(redis_url) as redis:  # no job is to end with its reader
        assert list(redis.scan_iter(READER("*"))) == []
    gateway.process.kill()
    gateway.process.wait()
    with GatewayProcess(redis_url, tmp_path) as other, openai_client(other) as client2:
        for number in reversed(range(NUM_EVENTS)):
            complete(hand, cut[number][0], number)
        for number, (_, before, stream) in cut.items():
            response_id = before[0].response.id
            after: Any = client2.responses.retrieve(response_id, stream=True, starting_after=number)
            events = [*before, *after]
            assert [e.sequence_number for e in events] == list(range(NUM_EVENTS)), number
            deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
            assert "".join(deltas) == TEXT
            assert events[-1].response.output_text == TEXT
            assert list(client2.responses.retrieve(response_id, stream=True)) == events
            stream.close()


def test_a_lost_worker_leaves_no_mark_in_the_numbers(client: OpenAI, redis_url: str) -> None:
    with EchoWorker(redis_url, leave_after=3, worker_id="first"):
        stream = client.responses.create(model="tiny", input="wörld", stream=True)
        events: list[Any] = [next(stream) for _ in range(8)]
        with EchoWorker(redis_url, worker_id="second"):
            events += list(stream)
    last = events[-1]
    job_id = job_id_of(last.response.id)
    with Redis.from_url(redis_url) as redis:
        kinds = [type(event).__name__ for _, event in read_events(redis, job_id)]
    assert kinds.count("RunStarted") == 2
    assert [e.sequence_number for e in events] == list(range(NUM_EVENTS))
    assert last.response.output_text == "wörld"


def test_a_foreground_response_ends_with_its_client_and_a_background_one_does_not(
    client: OpenAI, redis: Redis, redis_url: str
) -> None:
    with EchoWorker(redis_url, hold_after=1) as worker:
        behind = client.responses.create(model="tiny", input="ab", background=True, stream=True)
        first: Any = next(behind)
        behind.close()
        front = client.responses.create(model="tiny", input="cd", stream=True)
        second: Any = next(front)
        front.close()
        until(lambda: has_final(redis, second.response.id), "the gateway keeps the end")
        assert client.responses.retrieve(second.response.id).status == "cancelled"
        worker.go.set()
        assert ended(client, first.response.id).output_text == "ab"


def test_a_cancelled_response_is_cancelled_for_all_its_readers(
    client: OpenAI, hand: HandWorker
) -> None:
    stream = client.responses.create(model="tiny", input="Hi", background=True, stream=True)
    hand.say(hand.take(), "a")
    events: list[Any] = [next(stream) for _ in range(6)]
    response_id = events[0].response.id
    cancelled: Any = client.responses.cancel(response_id)
    assert (cancelled.status, cancelled.output_text) == ("cancelled", "a")
    assert cancelled.output[0].status == "incomplete"
    assert [e.type for e in stream] == ["response.cancelled"]
    assert client.responses.cancel(response_id) == cancelled


FAILURE = JobEnd(state="failed", code="engine_failed", message="the engine broke")


def test_a_failed_job_is_a_failed_response(client: OpenAI, hand: HandWorker) -> None:
    stream = client.responses.create(model="tiny", input="Hi", background=True, stream=True)
    claimed = hand.take()
    hand.say(claimed, "a")
    hand.finish(claimed, FAILURE)
    events: list[Any] = list(stream)
    failed = events[-1]
    assert failed.type == "response.failed"
    assert failed.response.status == "failed"
    assert failed.response.error.code == "server_error"
    assert "the engine broke" in failed.response.error.message
    assert client.responses.retrieve(failed.response.id) == failed.response


def test_an_answer_that_was_cut_off_is_incomplete(client: OpenAI, hand: HandWorker) -> None:
    made = client.responses.create(
        model="tiny", input="Hi", background=True, max_output_tokens=1, stream=True
    )
    claimed = hand.take()
    assert job_of(claimed).sampling.max_tokens == 1
    hand.say(claimed, "a")
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    hand.finish(claimed, JobEnd(state="finished", finish_reason="length", usage=usage))
    last: Any = list(made)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details.reason == "max_output_tokens"
    assert last.response.output[0].status == "incomplete"

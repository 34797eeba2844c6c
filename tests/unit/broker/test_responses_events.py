"""The events of a response are a function of its record and its job's channel."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from mixfleet_broker.gateway.responses_events import ResponseEvents, event_bytes
from mixfleet_broker.messages import (
    AnswerPart,
    JobEnd,
    JobEvent,
    Requeued,
    RunStarted,
    TokenChunk,
    TokenLogprob,
    Usage,
)
from mixfleet_broker.responses_store import StoredResponse

STARTED = RunStarted(run=1, worker_id="w1", num_tokens=0)
AGAIN = (
    Requeued(num_tokens=1, reason="lost"),
    RunStarted(run=2, worker_id="w2", num_tokens=1),
)
USAGE = Usage(prompt_tokens=3, completion_tokens=2)
CALLS = '[{"name": "clock", "arguments": {"zone": "here"}}, {"name": "dice"}]'


def finished(reason: Any = "stop") -> JobEnd:
    return JobEnd(state="finished", finish_reason=reason, usage=USAGE)


def chunk(text: str, *, part: AnswerPart = "text", logprobs: Sequence[float] = ()) -> TokenChunk:
    return TokenChunk(
        num_tokens=1,
        text=text,
        token_ids=(1,),
        part=part,
        logprobs=tuple(TokenLogprob(token=b"x", logprob=value) for value in logprobs),
    )


def record(**request: Any) -> StoredResponse:
    held = {"model": "tiny", "store": True, "top_logprobs": None, **request}
    return StoredResponse(job_id="j", tenant="t", created_at=1, request=held, items=[])


def events_of(channel: Sequence[JobEvent], **request: Any) -> list[Any]:
    reading = ResponseEvents(record(**request))
    events = reading.begin()
    for event in channel:
        events += reading.take(event)
    return events


def kinds(events: Sequence[Any]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_run_that_was_lost_leaves_no_mark() -> None:
    smooth = events_of([STARTED, chunk("a"), chunk("b"), finished()])
    assert events_of([STARTED, chunk("a"), *AGAIN, chunk("b"), finished()]) == smooth
    assert [event["sequence_number"] for event in smooth] == list(range(len(smooth)))


def test_events_keep_what_they_said_while_the_response_goes_on() -> None:
    reading = ResponseEvents(record())
    events = reading.begin() + reading.take(STARTED) + reading.take(chunk("a"))
    before = json.dumps(events)
    reading.take(chunk("b"))
    reading.take(finished())
    assert json.dumps(events) == before


def test_a_chunk_without_text_gives_no_event() -> None:
    events = events_of([STARTED, chunk(""), chunk("ü"), finished()])
    assert kinds(events).count("output_text.delta") == 1


def test_an_empty_answer_is_an_empty_message() -> None:
    response = events_of([STARTED, finished()])[-1]["response"]
    assert [part["text"] for item in response["output"] for part in item["content"]] == [""]
    assert response["status"] == "completed"


def test_no_log_probability_is_left_out() -> None:
    channel: list[JobEvent] = [
        STARTED,
        chunk("", logprobs=[-1]),
        chunk("a", logprobs=[-2]),
        chunk("", logprobs=[-3]),
        finished(),
    ]
    events = events_of(channel, top_logprobs=0)
    (delta,) = (event for event in events if event["type"] == "response.output_text.delta")
    assert [entry["logprob"] for entry in delta["logprobs"]] == [-1, -2]
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert [entry["logprob"] for entry in part["logprobs"]] == [-1, -2, -3]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert done["logprobs"] == part["logprobs"]


@pytest.mark.parametrize("cut", range(1, len(CALLS)))
def test_calls_are_the_same_however_their_text_is_cut(cut: int) -> None:
    pieces = [chunk(CALLS[:cut], part="tool_calls"), chunk(CALLS[cut:], part="tool_calls")]
    events = events_of([STARTED, *pieces, finished()])
    output = events[-1]["response"]["output"]
    assert [(item["name"], item["arguments"]) for item in output] == [
        ("clock", '{"zone": "here"}'),
        ("dice", "{}"),
    ]
    assert {item["status"] for item in output} == {"completed"}
    told = ["", ""]
    for event in events:
        if event["type"] == "response.function_call_arguments.delta":
            told[event["output_index"]] += event["delta"]
    assert told == [item["arguments"] for item in output]


def test_a_call_that_the_limit_cut_off_is_incomplete() -> None:
    events = events_of([STARTED, chunk(CALLS[:40], part="tool_calls"), finished("length")])
    assert kinds(events)[-1] == "incomplete"
    (call,) = events[-1]["response"]["output"]
    assert (call["status"], call["arguments"]) == ("incomplete", '{"zone":')


def test_text_before_calls_is_an_item_of_its_own() -> None:
    channel: list[JobEvent] = [
        STARTED,
        chunk("I look."),
        chunk(CALLS, part="tool_calls"),
        finished(),
    ]
    output = events_of(channel)[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert len({item["id"] for item in output}) == 3


@pytest.mark.parametrize(
    ("code", "told", "name"),
    [
        ("prompt_too_long", "invalid_prompt", "context_length_exceeded"),
        ("engine_failed", "server_error", "engine_failed"),
    ],
)
def test_a_failure_keeps_its_name_beside_one_that_clients_know(
    code: str, told: str, name: str
) -> None:
    end = JobEnd(state="failed", code=code, message="so it is")
    response = events_of([end])[-1]["response"]
    assert response["status"] == "failed"
    assert (response["error"]["code"], response["error"]["type"]) == (told, name)


def test_a_job_cancelled_in_the_queue_ends_at_once() -> None:
    events = events_of([JobEnd(state="canceled", message="enough")])
    assert kinds(events) == ["created", "queued", "cancelled"]
    assert events[-1]["response"]["error"] is None


def test_an_event_carries_its_name_on_the_wire() -> None:
    (line, data, *_) = event_bytes(events_of([])[:1]).decode().split("\n")
    assert line == "event: response.created"
    assert json.loads(data.removeprefix("data: "))["sequence_number"] == 0

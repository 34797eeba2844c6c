"""Streams through a real gateway, read by Anthropic's own client as it is."""

import asyncio
import json
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic import Anthropic, AsyncAnthropic

from mixfleet_broker.tool_call_text import tool_call_id
from support.answer_worker import AnswerWorker, Scripted
from support.anthropic_requests import (
    CALL,
    HELLO,
    MODEL,
    QUESTION,
    TOOL,
    ask,
    text_of,
)
from support.echo_worker import EchoWorker
from support.worker_process import until

GOLDEN = Path(__file__).parents[1] / "golden" / "anthropic_stream.json"


def test_a_stream_has_the_text_as_it_comes_and_the_same_message_at_its_end(
    client: Anthropic, worker: AnswerWorker
) -> None:
    worker.script += [HELLO, HELLO]
    with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
        assert list(stream.text_stream) == ["Hel", "lo", " 🙂"]
        streamed = stream.get_final_message()
    # The helper adds a field of its own.
    own = {"id": "", "stop_details": None}
    assert streamed.to_dict() | own == ask(client).to_dict() | own


async def _answers_of_the_async_client(url: str) -> tuple[str, list[str]]:
    async with AsyncAnthropic(base_url=url, api_key="none is needed", max_retries=0) as client:
        whole = await client.messages.create(model=MODEL, max_tokens=50, messages=QUESTION)
        async with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
            return text_of(whole), [text async for text in stream.text_stream]


def test_the_async_client_reads_the_same(url: str, worker: AnswerWorker) -> None:
    worker.script += [HELLO, HELLO]
    assert asyncio.run(_answers_of_the_async_client(url)) == ("Hello 🙂", ["Hel", "lo", " 🙂"])


def test_the_helper_reads_a_call_piece_by_piece(client: Anthropic, worker: AnswerWorker) -> None:
    worker.script.append(Scripted(CALL))
    with client.messages.stream(
        model=MODEL, max_tokens=50, messages=QUESTION, tools=[TOOL]
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    assert pieces == ['{"city": "Pa', 'ris"}']
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].to_dict()["input"] == {"city": "Paris"}


def test_the_events_of_a_stream_are_those_of_the_golden_file(
    url: str, worker: AnswerWorker
) -> None:
    worker.script.append(Scripted((*CALL, ("text", "Done."))))
    body = {"model": MODEL, "max_tokens": 50, "messages": QUESTION, "tools": [TOOL]}
    response = httpx2.post(f"{url}/v1/messages", json={**body, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    job_id = worker.jobs[0].job_id
    text = response.text.replace(job_id, "JOB").replace(tool_call_id(job_id, 0), "CALL")
    assert events_of(text) == json.loads(GOLDEN.read_text())


def events_of(text: str) -> list[Any]:
    """The data of all events but pings; each is named as its data says."""
    found = []
    for event in text.strip().split("\n\n"):
        if event.startswith((":", "event: ping")):
            continue
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def test_an_error_in_the_middle_is_an_event_and_an_error_of_the_client(
    client: Anthropic, worker: AnswerWorker
) -> None:
    with client.messages.stream(model=MODEL, max_tokens=50, messages=QUESTION) as stream:
        worker.script.append(Scripted((("text", "a"),), code="engine_failed"))
        with pytest.raises(anthropic.APIStatusError, match="as scripted") as caught:
            list(stream.text_stream)
    error = caught.value
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error"
    assert error.body["error"]["type"] == "api_error"
    assert error.body["request_id"] == error.request_id


@pytest.mark.slow  # a second passes before the first look
def test_a_stream_tells_while_it_waits_where_its_job_stands(url: str, worker: AnswerWorker) -> None:
    body = {"model": MODEL, "max_tokens": 50, "messages": QUESTION, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/messages", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith(": ")
        worker.script.append(HELLO)
        assert "event: message_stop" in list(lines)


def test_a_stream_that_has_nothing_to_say_is_kept_alive_by_pings(
    url: str, held: EchoWorker
) -> None:
    body = {"model": "held", "max_tokens": 50, "messages": QUESTION, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/messages", json=body) as response:
        lines = response.iter_lines()
        assert "event: message_start" in lines
        assert "event: ping" in lines
        assert next(lines) == 'data: {"type":"ping"}'
        held.go.set()
        assert "event: message_stop" in lines


def test_a_stream_that_is_left_ends_its_job(client: Anthropic, held: EchoWorker) -> None:
    with client.messages.stream(model="held", max_tokens=50, messages=QUESTION) as stream:
        assert next(iter(stream.text_stream)) == "W"
        assert held.lost == []
    until(lambda: len(held.lost) == 1, "the job is cancelled")


def test_a_whole_answer_that_is_not_waited_for_ends_its_job(
    client: Anthropic, held: EchoWorker
) -> None:
    with pytest.raises(anthropic.APITimeoutError):
        ask(client, model="held", timeout=0.5)
    until(lambda: len(held.lost) == 1, "the job is cancelled")

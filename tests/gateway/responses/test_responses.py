"""OpenAI's Responses API by OpenAI's own client: made, kept, deleted, gone on from."""

import json
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, ConflictError, NotFoundError, OpenAI
from redis import Redis

from mixfleet_broker.api_keys import ApiKeys
from mixfleet_broker.channel import read_events
from mixfleet_broker.key_records import KeyTerms
from mixfleet_broker.keys import CHANNEL, RESPONSE
from mixfleet_broker.messages import ChatMessage, JobEnd, OutputFormat, ToolCall
from support.gateway import GatewayProcess
from support.hand_worker import HandWorker, job_of
from support.openai_client import ended, has_final, job_id_of, openai_client
from support.worker_process import until

pytestmark = pytest.mark.slow  # a gateway process starts in a second or two

CALLS = '[{"name": "clock", "arguments": {"zone": "Zürich"}}]'
CLOCK: Any = {
    "type": "function",
    "name": "clock",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    "strict": False,
}


@pytest.mark.usefixtures("echo")
def test_a_response_is_whole_and_can_be_retrieved(client: OpenAI) -> None:
    made = client.responses.create(
        model="tiny", input="Grüße", metadata={"a": "b"}, temperature=0.5, instructions="Be brief."
    )
    assert (made.status, made.output_text) == ("completed", "Grüße")
    assert made.metadata == {"a": "b"}
    assert (made.temperature, made.instructions) == (0.5, "Be brief.")
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (2, 5)
    assert client.responses.retrieve(made.id) == made


def test_a_background_response_is_polled(client: OpenAI, hand: HandWorker, redis: Redis) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    assert (made.status, made.output, made.background) == ("queued", [], True)
    claimed = hand.take()
    hand.say(claimed, "a", "b")
    halfway = client.responses.retrieve(made.id)
    assert (halfway.status, halfway.output_text) == ("in_progress", "ab")
    hand.finish(claimed)
    assert ended(client, made.id).output_text == "ab"
    assert has_final(redis, made.id)


def test_the_gateway_keeps_the_end_of_a_response_that_nobody_asks_for(
    client: OpenAI, hand: HandWorker, redis: Redis
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    claimed = hand.take()
    hand.say(claimed, "kept")
    hand.finish(claimed)
    until(lambda: has_final(redis, made.id), "the gateway has seen the end")
    redis.delete(CHANNEL(job_id_of(made.id)))
    assert client.responses.retrieve(made.id).output_text == "kept"
    with pytest.raises(APIStatusError) as caught:
        client.responses.retrieve(made.id, stream=True)
    assert (caught.value.status_code, caught.value.code) == (410, "stream_expired")
    more = client.responses.create(
        model="tiny", input="More", previous_response_id=made.id, background=True
    )
    assert [m.content for m in job_of(hand.take()).messages] == ["Hi", "kept", "More"]
    client.responses.cancel(more.id)


def test_a_deleted_response_is_gone_and_its_job_ends(
    client: OpenAI, hand: HandWorker, redis: Redis
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    hand.take()
    client.responses.delete(made.id)
    with pytest.raises(NotFoundError) as caught:
        client.responses.retrieve(made.id)
    assert caught.value.code == "response_not_found"
    events = [event for _, event in read_events(redis, job_id_of(made.id))]
    assert isinstance(events[-1], JobEnd)
    assert events[-1].state == "canceled"
    assert redis.exists(RESPONSE(job_id_of(made.id))) == 0


@pytest.mark.usefixtures("echo")
def test_a_response_goes_on_from_the_one_before(client: OpenAI) -> None:
    one = client.responses.create(model="tiny", input="one", instructions="First rule.")
    two = client.responses.create(model="tiny", input="two", previous_response_id=one.id)
    assert two.usage is not None
    assert two.usage.input_tokens == 3  # an echo counts its messages: no instructions among them
    three = client.responses.create(model="tiny", input="three", previous_response_id=two.id)
    assert three.usage is not None
    assert three.usage.input_tokens == 5
    client.responses.delete(one.id)
    with pytest.raises(NotFoundError) as caught:
        client.responses.create(model="tiny", input="four", previous_response_id=three.id)
    assert caught.value.code == "previous_response_not_found"


def test_nothing_goes_on_from_a_response_without_an_answer(
    client: OpenAI, hand: HandWorker
) -> None:
    made = client.responses.create(model="tiny", input="Hi", background=True)
    hand.take()
    with pytest.raises(BadRequestError) as caught:
        client.responses.create(model="tiny", input="More", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_completed"


def test_a_tool_call_goes_out_and_its_result_comes_back(client: OpenAI, hand: HandWorker) -> None:
    stream = client.responses.create(
        model="tiny",
        input="What time is it?",
        tools=[CLOCK],
        tool_choice={"type": "function", "name": "clock"},
        background=True,
        stream=True,
    )
    claimed = hand.take()
    assert job_of(claimed).tool_choice == "=clock"
    assert [tool.name for tool in job_of(claimed).tools] == ["clock"]
    hand.say(claimed, "I look.")
    hand.say(claimed, CALLS[:30], CALLS[30:40], CALLS[40:], part="tool_calls")
    hand.finish(claimed)
    events: list[Any] = list(stream)
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == '{"zone": "Zürich"}'
    assert len(pieces) > 1
    assert [e.sequence_number for e in events] == list(range(len(events)))
    message, call = events[-1].response.output
    assert message.content[0].text == "I look."
    assert (call.name, call.arguments) == ("clock", '{"zone": "Zürich"}')
    client.responses.create(
        model="tiny",
        previous_response_id=events[0].response.id,
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "noon"}],
        tools=[CLOCK],
        background=True,
    )
    by_chain = job_of(hand.take()).messages
    client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "What time is it?"},
            *(item.model_dump() for item in events[-1].response.output),
            {"type": "function_call_output", "call_id": call.call_id, "output": "noon"},
        ],
        background=True,
    )
    assert job_of(hand.take()).messages == by_chain
    arguments = '{"zone": "Zürich"}'
    called = (ToolCall(call_id=call.call_id, name="clock", arguments=arguments),)
    assert by_chain == (
        ChatMessage(role="user", content="What time is it?"),
        ChatMessage(role="assistant", content="I look.", tool_calls=called),
        ChatMessage(role="tool", content="noon", call_id=call.call_id),
    )


def test_a_format_reaches_the_job(client: OpenAI, hand: HandWorker) -> None:
    schema: Any = {"type": "object", "properties": {}}
    client.responses.create(
        model="tiny",
        input="Hi",
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        background=True,
    )
    expected = OutputFormat(kind="json_schema", schema=json.dumps(schema))
    assert job_of(hand.take()).output_format == expected


@pytest.mark.usefixtures("echo")
def test_a_repeated_request_finds_the_first_response(client: OpenAI, redis: Redis) -> None:
    same = {"idempotency-key": "once"}
    first, second = (
        client.responses.create(model="tiny", input="Hi", extra_headers=same) for _ in range(2)
    )
    assert first == second
    assert len(list(redis.scan_iter(RESPONSE("*")))) == 1
    with pytest.raises(ConflictError):
        client.responses.create(model="tiny", input="Ho", extra_headers=same)
    assert client.responses.retrieve(first.id) == first


@pytest.mark.usefixtures("echo")
def test_what_is_not_stored_is_nowhere(client: OpenAI, redis: Redis) -> None:
    made = client.responses.create(model="tiny", input="Hi", store=False)
    assert made.output_text == "Hi"
    assert redis.exists(RESPONSE(job_id_of(made.id))) == 0
    with pytest.raises(NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(BadRequestError, match="background: needs store"):
        client.responses.create(model="tiny", input="Hi", store=False, background=True)


@pytest.mark.usefixtures("echo")
def test_input_items_are_listed_page_by_page(client: OpenAI) -> None:
    made = client.responses.create(
        model="tiny", input=[{"role": "user", "content": text} for text in "abc"]
    )
    listed: list[Any] = list(client.responses.input_items.list(made.id, limit=2))
    assert [item.content[0].text for item in listed] == ["c", "b", "a"]
    upward: list[Any] = list(client.responses.input_items.list(made.id, order="asc"))
    assert upward == listed[::-1]


@pytest.mark.usefixtures("hand")
@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"truncation": "auto"}, "truncation"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    client: OpenAI, redis: Redis, more: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadRequestError, match=named):
        client.responses.create(model="tiny", input="Hi", extra_body=more)
    assert list(redis.scan_iter(RESPONSE("*"))) == []


@pytest.mark.usefixtures("hand")
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"metadata": {"a": "\ud800"}}, "metadata: holds a lone surrogate"),
        ({"input": [{"id": "\ud800", "role": "user", "content": ""}]}, "input: holds a lone"),
        ({"tools": [{**CLOCK, "parameters": {"x": float("nan")}}]}, "tools: holds a number"),
    ],
)
def test_what_could_not_be_written_back_is_refused(
    gateway: GatewayProcess, more: dict[str, Any], told: str
) -> None:
    body = json.dumps({"model": "tiny", "input": "Hi", **more})
    with gateway.client() as client:
        reply = client.post(
            "/v1/responses", content=body, headers={"content-type": "application/json"}
        )
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


@pytest.mark.usefixtures("hand")
def test_a_refused_job_leaves_no_record(client: OpenAI, redis: Redis) -> None:
    with pytest.raises(NotFoundError):
        client.responses.create(model="nobody", input="Hi")
    with pytest.raises(BadRequestError):
        client.responses.create(model="tiny", input="Hi", temperature=9)
    assert list(redis.scan_iter(RESPONSE("*"))) == []


@pytest.mark.usefixtures("echo")
def test_a_response_of_another_key_is_not_there(gateway: GatewayProcess, redis: Redis) -> None:
    keys = ApiKeys(redis)
    secrets = [keys.create(KeyTerms(name=name))[1] for name in ("mine", "other")]
    mine, other = (openai_client(gateway, secret) for secret in secrets)
    with mine, other:
        made = mine.responses.create(model="tiny", input="Hi")
        assert mine.responses.retrieve(made.id).output_text == "Hi"
        for attempt in (
            other.responses.retrieve,
            other.responses.cancel,
            other.responses.delete,
            other.responses.input_items.list,
            lambda asked: other.responses.retrieve(asked, stream=True),
            lambda asked: other.responses.create(
                model="tiny", input="More", previous_response_id=asked
            ),
        ):
            with pytest.raises(NotFoundError):
                attempt(made.id)
        assert mine.responses.retrieve(made.id) == made
